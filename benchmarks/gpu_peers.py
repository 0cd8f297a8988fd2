"""Kernels of other projects, each as one call, for benchmarks/gpu.py: those that are installed."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from qexport.grid import INT4
from qexport.runtime.kernels.cuda import CudaKernel
from qexport.runtime.kernels.humming import HummingKernel
from qexport.runtime.kernels.triton import TritonKernel
from qexport.tensor import QuantizedTensor

__all__ = ["PEERS", "Call", "Prepare"]

Call = Callable[[Tensor], Tensor]
# A call that multiplies with a weight, or why there is none.
Prepare = Callable[[QuantizedTensor, torch.dtype], "Call | str"]


def _ours(weight: QuantizedTensor, half: torch.dtype) -> Call | str:
    kernel = CudaKernel()
    return kernel.refuses(weight.scheme, weight.shape, weight.codes.device) or (
        kernel.prepack(weight).matmul
    )


def _triton(weight: QuantizedTensor, half: torch.dtype) -> Call | str:
    kernel = TritonKernel()
    return kernel.refuses(weight.scheme, weight.shape, weight.codes.device) or (
        kernel.prepack(weight).matmul
    )


def _humming(weight: QuantizedTensor, half: torch.dtype) -> Call | str:
    kernel = HummingKernel()
    return kernel.refuses(weight.scheme, weight.shape, weight.codes.device) or (
        kernel.prepack(weight).matmul
    )


def _cublas(weight: QuantizedTensor, half: torch.dtype) -> Call | str:
    dense = weight.dequantize(half)
    return lambda x: linear(x, dense)


def _tinygemm(weight: QuantizedTensor, half: torch.dtype) -> Call | str:
    """torch's `_weight_int4pack_mm`: bfloat16, groups of 32 to 256, int4."""
    scheme = weight.scheme
    if half != torch.bfloat16 or scheme.grid != INT4 or scheme.group_size not in (32, 64, 128, 256):
        return "tinygemm has int4 in groups, for bfloat16"
    bytes_of_two = (weight.codes[:, ::2] << 4) | weight.codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(bytes_of_two.contiguous(), 8)
    scales = weight.scales.to(half).T
    # its weight is (code - 8) * scale + zero, and ours has the same middle
    pairs = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()
    group = scheme.group_size
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, pairs)


def _gemlite(weight: QuantizedTensor, half: torch.dtype) -> Call | str:
    """GemLite's linear; it has no 3 bits."""
    if importlib.util.find_spec("gemlite") is None:
        return "gemlite is not installed"
    bits, group = weight.scheme.grid.bits, weight.scheme.group_size
    if bits not in (1, 2, 4) or group is None:
        return "gemlite has 1, 2 and 4 bits in groups"
    from gemlite.core import DType, GemLiteLinear

    out, inputs = weight.shape
    dtype = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}[half]
    layer: Any = GemLiteLinear(bits, group, inputs, out, input_dtype=dtype, output_dtype=dtype)
    middle = weight.scheme.grid.middle
    zeros: Any = int(middle)
    if middle % 1:
        zeros = torch.full_like(weight.scales, middle, dtype=half)
    layer.pack(weight.codes, weight.scales.to(half), zeros, None)
    made: Call = layer
    return made


PEERS: dict[str, Prepare] = {
    "qexport": _ours,
    "humming": _humming,
    "gemlite": _gemlite,
    "tinygemm": _tinygemm,
    "triton": _triton,
    "cublas": _cublas,
}
