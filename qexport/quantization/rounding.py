"""A layer that has been decided on: the weights to round, and by which scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.grid import Scheme
from qexport.quantization.activations import Seen, importance
from qexport.quantization.fit import Fit, fit, fit_tensor
from qexport.quantization.kquant import fit_super_blocks
from qexport.tensor import QuantizedTensor

__all__ = ["Rounding", "nearest"]


@dataclass(frozen=True)
class Rounding:
    """Weights float32 [out, in] whose nearest codes, by the scales of `fit`, are the layer's."""

    weight: Tensor
    fit: Fit
    scheme: Scheme

    def tensor(self) -> QuantizedTensor:
        """Codes and scales."""
        return self.fit.codes(self.weight, self.scheme)


def nearest(
    weight: Tensor, scheme: Scheme, seen: Seen | None, *, per_tensor: bool = False
) -> Rounding:
    """Round to nearest (RTN), by scales of least squared error: of outputs, where they are seen."""
    weights = None if seen is None else importance(seen.hessian)
    find = fit_tensor if per_tensor else fit
    if scheme.super_block is not None and scheme.scale_dtype == torch.float32:
        find = fit_super_blocks
    return Rounding(weight, find(weight, scheme, weights), scheme)
