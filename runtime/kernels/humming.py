"""Humming's kernels behind the protocol, where the package humming-kernels is installed."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from qexport.errors import UnsupportedError
from qexport.formats.humming import Humming
from qexport.grid import Scheme, dtype_name
from qexport.runtime.kernels.base import Kernel, Linear
from qexport.tensor import QuantizedTensor

__all__ = ["HummingKernel"]

_MULTIPLE = 128  # of outputs and inputs, that its tiles divide
_MODULE = "layer"


class _HummingLinear(Linear):
    """Its kernels are made for one dtype of activations, the first that comes."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight: QuantizedTensor | None = weight
        self._bias = bias
        self._layer: Any = None
        self._dtype: torch.dtype | None = None

    def matmul(self, x: Tensor) -> Tensor:
        if self._weight is not None:
            self._layer, self._dtype = _layer(self._weight, self._bias, x.dtype), x.dtype
            self._weight = None
        if x.dtype != self._dtype:
            raise ValueError(f"these weights are packed for {self._dtype}, not for {x.dtype}")
        made: Tensor = self._layer(x.contiguous())
        return made


class HummingKernel(Kernel):
    """Uniform grids up to 8 bits, zero points as numbers; taken where it is named or measured."""

    name = "humming"
    activations = (torch.float16, torch.bfloat16)
    capability = 75

    def refuses(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        if importlib.util.find_spec("humming") is None:
            return "humming-kernels is not installed"
        if device.type != "cuda":
            return f"it runs on NVIDIA GPUs, not on {device.type}"
        return self.refuses_scheme(scheme, shape)

    def refuses_scheme(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not scheme.grid.uniform:
            return f"{scheme.grid.name} is not a uniform grid"
        if scheme.scale_dtype == torch.float32:
            return "its scales have 16 bits, and these have 32"
        if any(size % _MULTIPLE for size in shape):
            return f"{shape[0]} x {shape[1]} is not made of whole tiles of {_MULTIPLE}"
        return Humming().refuses(scheme, shape)

    def prepack(self, weight: QuantizedTensor, bias: Tensor | None = None) -> Linear:
        self.check(weight)
        return _HummingLinear(weight, bias)


def _exactly(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales or zero points in the activations' dtype, in which humming wants them.

    Raises UnsupportedError where that would round one.
    """
    found = tensor.to(dtype)
    if not torch.equal(found.to(tensor.dtype), tensor):
        raise UnsupportedError(
            f"humming would round scales of {dtype_name(tensor.dtype)} to {dtype_name(dtype)}; use "
            f"--dtype {dtype_name(tensor.dtype)} or another --kernel."
        )
    return found


def _layer(weight: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype) -> Any:
    from humming.layer import HummingLayer

    parts = Humming().encode_parts(_MODULE, weight)
    tensors = {name.removeprefix(f"{_MODULE}."): part for name, part in parts.items()}
    zero_point = "zero_point" in tensors
    layer = HummingLayer(
        shape_n=weight.shape[0],
        shape_k=weight.shape[1],
        weight_config={
            "quant_method": "humming",
            "b_dtype": f"uint{weight.scheme.grid.bits}",
            "weight_scale_group_size": weight.scheme.group_size or 0,
            "has_zero_point": zero_point,
            "is_fp_zero_point": zero_point,
        },
        has_bias=bias is not None,
        torch_dtype=dtype,
    )
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            tensors[name] = _exactly(tensor, dtype) if name != "bias" else tensor.to(dtype)
    layer.load_from_tensors(tensors)
    layer = layer.to(weight.codes.device)
    layer.transform()
    return layer
