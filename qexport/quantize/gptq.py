"""GPTQ (Frantar et al. 2023): round one input after the other, and let the rest make up for it.

For the inputs X that a layer sees, the squared error of its output is `tr(D H D^T)` with D the
error of the weights and H = X^T X. When one column has been rounded, the columns that are still to
come can take up most of what it lost; by how much is in the Cholesky factor of the inverse of H.
Columns go from the most to the least active, by scales that were set for all groups before
(static groups): no `g_idx` is needed for that order.
"""

import torch
from torch import Tensor

from qexport.errors import QexportError
from qexport.grid import Scheme
from qexport.tensor import quantize

__all__ = ["compensate"]

_BLOCK = 128  # columns whose errors are gathered before the rest is told
_DAMPING, _MORE, _TRIES = 0.01, 10.0, 4  # of the mean of H's diagonal


def compensate(weight: Tensor, hessian: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Weights [out, in] float32 whose nearest codes, for these scales, are GPTQ's solution.

    hessian   float32 [in, in], of inputs: their sum of outer products, to any factor
    scale     float32 [out, groups], as it will be stored

    Raises QexportError where the Hessian has no Cholesky factor even with tenfold damping, thrice.
    """
    inputs = weight.shape[1]
    order = hessian.diagonal().argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    groups = torch.arange(inputs, device=weight.device) // (inputs // scale.shape[1])
    scales, work = scale[:, groups[order]], weight[:, order].clone()
    alone = Scheme(scheme.grid, None, torch.float32)  # a column at a time
    found = torch.empty_like(work)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        errors = torch.empty_like(work[:, start:end])
        for column in range(start, end):
            value = work[:, column].clone()
            found[:, column] = value
            rounded = quantize(value[:, None], scales[:, column, None], alone).dequantize()[:, 0]
            error = (value - rounded) / factor[column, column]
            work[:, column:end] -= torch.outer(error, factor[column, column:end])
            errors[:, column - start] = error
        work[:, end:] -= errors @ factor[start:end, end:]
    return found[:, order.argsort()]


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse; inputs that are never active count as little."""
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damping = _DAMPING
    for _ in range(_TRIES):
        damped = hessian.double() + torch.eye(len(hessian), device=hessian.device) * damping * mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                found: Tensor = upper.float()
                return found
        damping *= _MORE
    raise QexportError(
        "the inputs of a layer say too little to compensate by; give more calibration text."
    )
