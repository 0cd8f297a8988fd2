"""AWQ (Lin et al. 2024): weights of active inputs are made larger, and so rounded more finely.

The factors are powers of the inputs' sizes; the power is the one with the least error of the
outputs, which the Hessian of the inputs gives for any change of the weights.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qexport.grid import Scheme
from qexport.quantization.activations import Seen, importance
from qexport.quantization.fit import fit

__all__ = ["awq_factors"]

_POWERS = 20


def awq_factors(
    weights: Sequence[Tensor],
    schemes: Sequence[Scheme],
    seen: Seen,
    tied: Callable[[Tensor], Tensor],
) -> Tensor:
    """Factors float32 [in] for layers that share their inputs; ones where none does better."""
    size = tied(seen.hessian.diagonal().sqrt())
    size = size.clamp(min=float(size.max()) * 1e-4 or 1.0)
    matters = importance(seen.hessian)
    best, least = torch.ones_like(size), float("inf")
    for step in range(_POWERS):
        factors = size ** (step / _POWERS)
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = 0.0
        for weight, scheme in zip(weights, schemes, strict=True):
            larger = weight * factors
            found = fit(larger, scheme, matters / factors.square(), coarse=True)
            made = found.codes(larger, scheme).dequantize() / factors
            lost = made - weight
            error += float(((lost @ seen.hessian) * lost).sum())
        if error < least:
            best, least = factors, error
    return best
