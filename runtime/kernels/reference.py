"""The oracle: weights dequantized once by the project's one function, multiplied by torch."""

import torch
from torch import Tensor

from qexport.grid import Scheme
from qexport.runtime.kernels.base import Kernel, Linear
from qexport.tensor import QuantizedTensor

__all__ = ["ReferenceKernel"]


class _Dense(Linear):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._bias = bias

    def matmul(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self._weight, self._bias)


class ReferenceKernel(Kernel):
    """Every scheme on every device, in `dtype`; as large as the dense model."""

    name = "reference"
    device = None

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype

    def refuses_scheme(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return None

    def refuses(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        return None

    def prepack(self, weight: QuantizedTensor, bias: Tensor | None = None) -> Linear:
        return self.wrap(weight.dequantize(self._dtype), bias)

    def wrap(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """The same for a weight that is dense already."""
        return _Dense(weight.to(self._dtype), None if bias is None else bias.to(self._dtype))
