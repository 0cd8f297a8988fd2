"""The C interface of `runtime/csrc/cpu/qexport_cpu.h`, as ctypes sees it."""

import ctypes
import importlib.util
import os
from ctypes import (
    CDLL,
    POINTER,
    Structure,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_long,
    c_size_t,
    c_uint64,
    c_void_p,
)
from functools import lru_cache

import torch

from qexport.errors import UnsupportedError

__all__ = ["DTYPES", "Context", "CpuLayer", "CpuLinearStruct", "CpuModel", "CpuStep", "library"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class CpuLinearStruct(Structure):
    """`qx_linear`."""

    _fields_ = (
        *((name, c_int32) for name in ("bits", "dtype", "n", "k", "group", "act_group")),
        ("zero", c_float),
        *((name, c_void_p) for name in ("weight", "scales", "zeros", "bias")),
    )


class CpuLayer(Structure):
    """`qx_layer`."""

    _fields_ = (
        *((name, c_void_p) for name in ("norm1", "norm2", "q_norm", "k_norm")),
        *((name, c_int32) for name in ("n_qkv", "n_up", "window", "rope")),
        ("qkv", CpuLinearStruct * 3),
        ("o", CpuLinearStruct),
        ("up", CpuLinearStruct * 2),
        ("down", CpuLinearStruct),
        *((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
    )


class CpuModel(Structure):
    """`qx_model`."""

    _fields_ = (
        *((n, c_int32) for n in ("hidden", "inter", "heads", "kv_heads", "head_dim", "rotary_dim")),
        *((name, c_int32) for name in ("context", "cache_dtype", "exact", "n_layers")),
        *((name, c_float) for name in ("eps", "residual_scale", "attention_scale")),
        ("layers", POINTER(CpuLayer)),
    )


class CpuStep(Structure):
    """`qx_step`."""

    _fields_ = (
        ("n", c_int32),
        *((name, c_void_p) for name in ("slot", "position", "cos", "sin")),
    )


_FUNCTIONS = {
    "qx_context_new": (c_void_p, [c_int, c_void_p]),
    "qx_context_free": (None, [c_void_p]),
    "qx_isa": (c_char_p, []),
    "qx_force_isa": (c_int, [c_char_p]),
    "qx_packed_bytes": (c_size_t, [c_int] * 3),
    "qx_pack": (None, [c_void_p, c_int, c_int, c_int, c_void_p]),
    "qx_linear_forward": (
        None,
        [c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_long, c_int, c_int, c_float],
    ),
    "qx_embed": (None, [c_void_p, c_int, c_void_p, c_int, c_int, c_float, c_void_p]),
    "qx_rms_norm": (None, [c_void_p, c_void_p, c_void_p, c_float, c_int, c_int, c_void_p]),
    "qx_model_forward": (None, [c_void_p] * 4),
    "qx_read": (c_uint64, [c_void_p, c_void_p, c_size_t]),
}


@lru_cache(maxsize=1)
def library() -> CDLL | None:
    """The compiled kernels; None where the package was installed without a C++ compiler.

    QEXPORT_CPU_ISA (`avx512-vnni`, `avx2`, `generic`) forces an instruction set. Raises
    UnsupportedError for one that this machine lacks.
    """
    spec = importlib.util.find_spec("qexport.runtime.kernels._cpu")
    if spec is None or spec.origin is None:
        return None
    found = CDLL(spec.origin)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    forced = os.environ.get("QEXPORT_CPU_ISA")
    if forced and found.qx_force_isa(forced.encode()):
        raise UnsupportedError(f"QEXPORT_CPU_ISA={forced} is nothing that this machine has.")
    return found


class Context:
    """Threads and their buffers.

    threads   with the calling one; default: torch's number
    shared    torch's own threads, where its OpenMP is to be found, instead of threads that would
              spin beside them: for layers that stand between torch's operations
    """

    def __init__(self, threads: int | None = None, *, shared: bool = False) -> None:
        kernels = library()
        assert kernels is not None
        self.threads = threads or torch.get_num_threads()
        self._library = kernels
        parallel = _torchs_openmp() if shared else None
        self.handle = c_void_p(kernels.qx_context_new(self.threads, parallel))
        if not self.handle:
            raise UnsupportedError(
                f"the system does not give {self.threads} threads; ask for fewer with --threads."
            )

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.qx_context_free(self.handle)


@lru_cache(maxsize=1)
def default_context() -> Context:
    """The one that layers outside a decoder share."""
    return Context(shared=True)


def _torchs_openmp() -> int | None:
    """Address of the function by which torch starts its threads: libgomp's, or libomp's own."""
    try:
        return ctypes.cast(CDLL(None).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError, TypeError):  # another threading; no such namespace
        return None


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Address of a contiguous tensor's first element."""
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
