"""A layer that has been decided on: the weights to round, and by which scales."""

from dataclasses import dataclass

from torch import Tensor

from qexport.grid import Scheme
from qexport.quantize.activations import Seen, importance
from qexport.quantize.fit import Fit, fit, fit_tensor
from qexport.tensor import QuantizedTensor, quantize

__all__ = ["Rounding", "nearest"]


@dataclass(frozen=True)
class Rounding:
    """Weights float32 [out, in] whose nearest codes, by the scales of `fit`, are the layer's."""

    weight: Tensor
    fit: Fit
    scheme: Scheme

    def tensor(self) -> QuantizedTensor:
        """Codes and scales."""
        return quantize(self.weight, self.fit.scale, self.scheme, self.fit.zeros)


def nearest(
    weight: Tensor, scheme: Scheme, seen: Seen | None, *, per_tensor: bool = False
) -> Rounding:
    """Round to nearest (RTN), by scales of least squared error: of outputs, where they are seen."""
    weights = None if seen is None else importance(seen.hessian)
    found = (fit_tensor if per_tensor else fit)(weight, scheme, weights)
    return Rounding(weight, found, scheme)
