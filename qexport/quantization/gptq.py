"""GPTQ (Frantar et al. 2023): round one input after the other, and let the rest make up for it.

For the inputs X that a layer sees, the squared error of its output is `tr(D H D^T)` with D the
error of the weights and H = X^T X. When one column has been rounded, the columns that are still to
come can take up most of what it lost; by how much is in the Cholesky factor of the inverse of H.
Columns go from the most to the least active, by scales that were set for all groups before
(static groups): no `g_idx` is needed for that order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.errors import QexportError
from qexport.grid import Scheme
from qexport.quantization.activations import output_error
from qexport.quantization.fit import Fit
from qexport.quantization.rounding import Rounding
from qexport.tensor import QuantizedTensor, storable

__all__ = ["GptqOptions", "Inputs", "compensate", "gptq"]

_MORE, _TRIES = 10.0, 4
_RIDGE = 1e-4
_REFIT_NUMBERS = 1 << 26  # of the matrices that are solved at a time


@dataclass(frozen=True)
class GptqOptions:
    """How columns are gone through.

    percdamp     what is added to H's diagonal, in units of its mean; ten times as much, up to
                 thrice, where H has no Cholesky factor
    block_size   columns whose errors are gathered before the rest is told; speed alone
    act_order    from the most to the least active input, or from the first to the last
    refits       times that scales are fitted to the codes found, and codes to these scales
    """

    percdamp: float = 0.01
    block_size: int = 128
    act_order: bool = True
    refits: int = 2


_DEFAULT = GptqOptions()


@dataclass(frozen=True)
class Inputs:
    """What GPTQ has to know of a layer's inputs; those that see the same ones share it.

    hessian   float32 [in, in]: their sum of outer products, to any factor
    order     int64 [in], in which columns are rounded
    factor    float64 [in, in], upper Cholesky factor of the inverse of H in that order
    """

    hessian: Tensor
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, hessian: Tensor, options: GptqOptions = _DEFAULT) -> "Inputs":
        """Raises QexportError where H has no Cholesky factor even with tenfold damping, thrice."""
        order = torch.arange(len(hessian), device=hessian.device)
        if options.act_order:
            order = hessian.diagonal().argsort(descending=True)
        return cls(hessian, order, _inverse_factor(hessian[order][:, order], options.percdamp))


def gptq(
    weight: Tensor, inputs: Inputs, first: Fit, scheme: Scheme, options: GptqOptions = _DEFAULT
) -> Rounding:
    """The layer `weight` [out, in] float32 on the grid; `first` are the scales to begin with."""

    def rounded(found: Fit) -> tuple[Rounding, float]:
        made = compensate(weight, inputs, found, scheme, options.block_size)
        rounding = Rounding(made, found, scheme)
        return rounding, output_error(weight, rounding.tensor().dequantize(), inputs.hessian)

    best, least = rounded(first)
    for _ in range(options.refits):
        made, error = rounded(Fit(_refit(weight, inputs.hessian, best.tensor()), first.zeros))
        if not error < least:
            break
        best, least = made, error
    return best


def compensate(
    weight: Tensor,
    inputs: Inputs,
    fit: Fit,
    scheme: Scheme,
    block_size: int = _DEFAULT.block_size,
) -> Tensor:
    """Weights [out, in] whose nearest codes, for the scales of `fit`, are GPTQ's solution.

    It is reckoned in the dtype of `weight`.
    """
    order, count = inputs.order, weight.shape[1]
    factor = inputs.factor.to(weight.dtype)
    groups = order // (count // fit.scale.shape[1])
    fits = fit.columns(groups)
    work = weight.T[order]  # [in, out]: a column of weights is a row, which lies together
    alone = Scheme(scheme.grid, None, torch.float32)
    found = torch.empty_like(work)
    for start in range(0, count, block_size):
        end = min(start + block_size, count)
        errors = torch.empty_like(work[start:end])
        for column in range(start, end):
            value = found[column] = work[column]
            made = fits[column].codes(value[:, None], alone).dequantize()
            error = errors[column - start]
            torch.sub(value, made[:, 0], out=error).div_(factor[column, column])
            work[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return found[order.argsort()].T.contiguous()


def _inverse_factor(hessian: Tensor, percdamp: float) -> Tensor:
    """The upper Cholesky factor of the inverse; inputs that are never active count as little."""
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damping = percdamp
    for _ in range(_TRIES):
        matrix = hessian.double()  # what it becomes replaces it: each is half a gigabyte at 8192
        matrix.diagonal().add_(damping * mean)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            matrix = torch.cholesky_inverse(matrix)
            upper, failed = torch.linalg.cholesky_ex(matrix, upper=True)
            if not failed:
                found: Tensor = upper
                return found
        damping *= _MORE
    raise QexportError(
        "the inputs of a layer say too little to compensate by; give more calibration text."
    )


def _refit(weight: Tensor, hessian: Tensor, found: QuantizedTensor) -> Tensor:
    """The scales float32 [out, groups] by which the codes found make the least output error.

    For the units u = code - zero, the error of a row is quadratic in the scales of its groups.
    """
    scales = found.scales.float()
    units = found.dequantize().view(*scales.shape, -1) / scales.unsqueeze(-1)
    rows = max(1, _REFIT_NUMBERS // scales.shape[1] ** 2)
    best = [
        _best_scales(weight[i : i + rows], units[i : i + rows], scales[i : i + rows], hessian)
        for i in range(0, len(weight), rows)
    ]
    return storable(torch.cat(best), found.scheme)


def _best_scales(weight: Tensor, units: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """[rows, groups], of weights [rows, in] and their units [rows, groups, group size]."""
    out, groups = scales.shape
    size = weight.shape[1] // groups
    matrix = torch.empty(out, groups, groups, device=weight.device)
    for group in range(groups):
        told = units[:, group] @ hessian[group * size : (group + 1) * size]  # [out, in]
        matrix[:, group] = (told.view(out, groups, -1) * units).sum(-1)
    wanted = ((weight @ hessian).view(out, groups, -1) * units).sum(-1)
    # a little is held to the scale that is there, which groups that say nothing keep
    ridge = matrix.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) * _RIDGE
    matrix.diagonal(dim1=1, dim2=2).add_(ridge)
    wanted += ridge * scales
    solved, failed = torch.linalg.solve_ex(matrix, wanted.unsqueeze(-1))
    scale = solved.squeeze(-1)
    usable = scale.isfinite() & (scale > 0) & (failed == 0).unsqueeze(-1)
    # a group whose codes do little is not rounded to nothing, from where no training leads back
    return torch.where(usable, torch.maximum(scale, scales / 16), scales)
