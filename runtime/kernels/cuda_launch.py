"""Launching compiled kernels: libcuda by ctypes, on torch's current stream."""

import ctypes
from ctypes import byref, c_char_p, c_int, c_uint, c_void_p
from functools import cache, lru_cache

import torch

from qexport.errors import UnsupportedError
from qexport.runtime.kernels.cuda_source import KERNEL, compiled

__all__ = ["DenseProblem", "MatmulProblem", "architecture", "launch"]

_MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


class MatmulProblem(ctypes.Structure):
    """qx::Problem of matmul.cuh."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "weights", "scales", "zeros", "bias", "out")),
        *((name, c_void_p) for name in ("partial", "arrived")),
        *((name, c_int) for name in ("M", "N", "K", "stride_x", "tiles", "chunks")),
    )


class DenseProblem(ctypes.Structure):
    """qx::Dense of dequantize.cuh."""

    _fields_ = (
        *((name, c_void_p) for name in ("weights", "scales", "zeros", "out")),
        *((name, c_int) for name in ("N", "K", "chunks", "first_tile")),
    )


@cache
def architecture(device: torch.device) -> str:
    """What kernels are compiled for: `sm_90a` on Hopper, whose own instructions they use."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"


def launch(
    text: str,
    problem: ctypes.Structure,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    device: torch.device,
) -> None:
    """Run the kernel of a source text on the current stream of `device`.

    It is compiled and loaded when it is first wanted, which is not possible while a CUDA graph is
    captured: run it once before. Raises UnsupportedError where the driver refuses.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            launch(text, problem, grid, threads, shared, device)
        return
    function = _function(text, shared, index)
    stream = c_void_p(torch.cuda.current_stream(device).cuda_stream)
    arguments = (c_void_p * 1)(ctypes.addressof(problem))
    sizes = [*map(c_uint, grid), c_uint(threads), c_uint(1), c_uint(1), c_uint(shared)]

    def start() -> int:
        return int(_driver().cuLaunchKernel(function, *sizes, stream, arguments, None))

    result = start()
    if result == _NO_CONTEXT:  # a thread in which torch has not used this device yet
        torch.cuda.synchronize(device)
        result = start()
    _check(result)


@cache
def _function(text: str, shared: int, index: int) -> c_void_p:
    device = torch.device("cuda", index)
    cubin = compiled(text, architecture(device))
    driver, module, function = _driver(), c_void_p(), c_void_p()
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)  # makes its context this thread's
        _check(driver.cuModuleLoadData(byref(module), c_char_p(cubin)))
        _check(driver.cuModuleGetFunction(byref(function), module, KERNEL.encode()))
        _check(driver.cuFuncSetAttribute(function, _MOST_SHARED, c_int(shared)))
    return function


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(f"NVIDIA's driver cannot be loaded ({error}).") from error


def _check(result: int) -> None:
    if result:
        said = c_char_p()
        _driver().cuGetErrorString(c_int(result), byref(said))
        text = said.value.decode() if said.value else f"error {result}"
        raise UnsupportedError(f"a CUDA kernel cannot be run: {text}.")
