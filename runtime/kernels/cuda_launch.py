"""Launching compiled kernels: libcuda by ctypes, on torch's current stream."""

import ctypes
from ctypes import byref, c_int, c_void_p
from functools import lru_cache

import torch

from qexport.errors import UnsupportedError
from qexport.runtime.kernels.cuda_source import compiled

__all__ = ["Function", "MatmulProblem", "architecture", "function"]

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class MatmulProblem(ctypes.Structure):
    """qx::Problem of matmul.cuh."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "weights", "scales", "zeros", "bias", "out")),
        *((name, c_void_p) for name in ("partial", "arrived")),
        *((name, c_int) for name in ("M", "N", "K", "stride_x", "tiles", "chunks")),
    ]
