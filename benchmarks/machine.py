"""Where a benchmark's result is kept."""

import json
import re
from pathlib import Path
from typing import Any

from qexport.runtime.bench.machine import cpu_name, describe

__all__ = ["RESULTS", "describe", "record"]

RESULTS = Path(__file__).parent / "results"


def record(name: str, result: dict[str, Any]) -> Path:
    """Write `results/<machine>/<name>.json` and return its path."""
    machine = describe()
    cores = machine["cores"]
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", f"{cpu_name()} {cores} cores".lower())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, **result}, indent=2) + "\n")
    return path
