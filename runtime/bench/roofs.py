"""How fast a device reads and multiplies, measured."""

import time
from collections.abc import Callable
from typing import Any

import torch

from qexport.grid import INT8, Scheme
from qexport.runtime.bench.kernels import random_weight
from qexport.runtime.hardware import Hardware
from qexport.runtime.kernels import KERNELS
from qexport.runtime.machine import cpu_name, memory_bytes

__all__ = ["roofs"]

_STREAMED = 512 << 20  # bytes: more than caches hold
_SIDE = 2048  # of matrices
_TOKENS = 256  # as many as a prompt's steps have
_SECONDS = 0.5  # for each


def roofs(device: torch.device) -> Hardware:
    """This machine's roofs as they are reached: reading memory, and multiplying matrices.

    By torch in bfloat16 on GPUs and in float32 on CPUs, and there by our kernel in int8 too; half
    a second each.
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
        int8=_int8_rate(device),
        kind=device.type,
        capability=10 * major + minor,
    )


def _int8_rate(device: torch.device) -> float:
    """Operations per second in our kernel for CPUs, which multiplies as prompts do."""
    kernel, scheme, shape = KERNELS["cpu"], Scheme(INT8), (_SIDE, _SIDE)
    if kernel.refuses(scheme, shape, device) is not None:
        return 0.0
    linear = kernel.prepack(random_weight(scheme, shape, device))
    x = torch.ones(_TOKENS, _SIDE)
    return 2 * _TOKENS * _SIDE**2 / _best(lambda: linear.matmul(x), device)


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
