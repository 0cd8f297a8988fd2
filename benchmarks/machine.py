"""What a result was measured on, and where it is kept."""

import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "safetensors")


def describe() -> dict[str, Any]:
    """CPU, cores, load and versions, to stand beside every figure."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
    }


def record(name: str, result: dict[str, Any]) -> Path:
    """Write `results/<machine>/<name>.json` and return its path."""
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", f"{_cpu_name()} {os.cpu_count()} cores".lower())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **result}, indent=2) + "\n")
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
