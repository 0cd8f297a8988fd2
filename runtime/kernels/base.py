"""What every kernel is: it refuses what it cannot do, prepacks once, and multiplies."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from qexport.grid import Scheme
from qexport.tensor import QuantizedTensor

__all__ = ["Kernel", "Linear"]


class Linear(ABC):
    """A weight matrix [out_features, in_features] in a kernel's own order, ready to multiply."""

    in_features: int
    out_features: int

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias` for x [tokens, in_features]; returns [tokens, out_features]."""


class Kernel(ABC):
    """One way of multiplying with quantized weights.

    activations   dtypes that its products take
    device        type of the devices that it runs on; None for every one
    capability    the oldest NVIDIA architecture, as in 80
    """

    name: str
    activations: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    device: str | None = "cuda"
    capability = 70

    @abstractmethod
    def refuses_scheme(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why no weight [out, in] of this scheme is taken on any device; None where it may be."""

    @abstractmethod
    def refuses(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Why a weight [out, in] of this scheme is not served on `device`; None where it is."""

    @abstractmethod
    def prepack(self, weight: QuantizedTensor, bias: Tensor | None = None) -> Linear:
        """Bring codes into the kernel's order; the values that they stand for stay the same.

        Raises ValueError for what `refuses` refuses.
        """

    def check(self, weight: QuantizedTensor) -> None:
        """Raise ValueError for what `refuses` refuses."""
        reason = self.refuses(weight.scheme, weight.shape, weight.codes.device)
        if reason is not None:
            raise ValueError(reason)
