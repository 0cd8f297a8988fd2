"""Where a benchmark's result is kept."""

import json
import re
from pathlib import Path
from typing import Any

from qexport.runtime.machine import cpu_name, describe

__all__ = ["RESULTS", "describe", "place", "record"]

RESULTS = Path(__file__).parent / "results"


def record(name: str, result: dict[str, Any]) -> Path:
    """Write `results/<machine>/<name>.json` and return its path."""
    machine = describe()
    path = place(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **result}, indent=2) + "\n")
    return path


def place(name: str) -> Path:
    """Where this machine's result is recorded."""
    cores = describe()["cores"]
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", f"{cpu_name()} {cores} cores".lower())
    return folder / f"{name}.json"
