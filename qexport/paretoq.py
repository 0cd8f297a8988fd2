"""ParetoQ's quantizers (arXiv 2502.02631): forward, gradients and initial scales.

Every width has a learned `alpha` per channel or group. It becomes a step, `alpha * step`, and the
step, rounded to a storable value, is the scale that is trained with, written and served. With
`q = code - zero`:

    bits  grid     step   levels / alpha    dL/dW passes where       initial alpha
    1     binary   2      {-1, 1}           |W| <= alpha             mean |W|
    1.58  ternary  2/3    {-2/3, 0, 2/3}    |W| <= 0.99 alpha        max |W|
    2     seq2     1/2    {+-1/4, +-3/4}    |W| <= 0.99 alpha        max |W|
    3     int3     1      {-4 .. 3}         -4 <= W/alpha <= 3       max |W| / 3
    4     int4     1      {-8 .. 7}         -8 <= W/alpha <= 7       max |W| / 7

The formulas are those of the released code, whose 0.99 the paper's equations lack, with its slips
mended: a zero weight at 1 bit is positive rather than a third level, a saturated ternary weight
pulls alpha with its own level 2/3 instead of 1, and every group has an initial scale of its own.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from qexport.errors import CheckpointError
from qexport.fused import compiled
from qexport.grid import BINARY, INT3, INT4, SEQ2, TERNARY, Grid, Scheme
from qexport.tensor import QuantizedTensor, quantize, storable

Gradient = Literal["paper", "stable"]

__all__ = [
    "WIDTHS",
    "Gradient",
    "Width",
    "effective_scale",
    "fake_quantize",
    "from_upstream",
    "initial_alpha",
    "upstream_scale",
    "width_of",
]

_SMALLEST_ALPHA = 1e-5
_STABLE_DAMPING = 0.21 * math.sqrt(2) * math.pi  # StableQAT's amplitude, in units of the slope
_SHRINK_FACTORS = 32
_SEARCH_CHUNK = 1 << 18  # weights searched at a time, so that the candidates stay in the cache


@dataclass(frozen=True)
class Width:
    """One row of the table above; bounds are in units of alpha, `qp` scales alpha's gradient."""

    bits: str
    grid: Grid
    step: float
    low: float
    high: float
    qp: int


WIDTHS = {
    width.bits: width
    for width in (
        Width("1", BINARY, 2.0, -1.0, 1.0, 1),
        Width("1.58", TERNARY, 2.0 / 3.0, -0.99, 0.99, 1),
        Width("2", SEQ2, 0.5, -0.99, 0.99, 1),
        Width("3", INT3, 1.0, -4.0, 3.0, 3),
        Width("4", INT4, 1.0, -8.0, 7.0, 7),
    )
}
_BY_GRID = {width.grid: width for width in WIDTHS.values()}
TRAINED_GRIDS = frozenset(_BY_GRID)


def width_of(scheme: Scheme) -> Width:
    """The ParetoQ width whose grid a scheme uses. Raises KeyError for other grids."""
    return _BY_GRID[scheme.grid]


def effective_scale(alpha: Tensor, scheme: Scheme) -> Tensor:
    """The float32 scale [out, groups] that `alpha` [out, groups] trains with and is stored as.

    The step is folded in first; the product is then rounded to a portable value unless the scheme
    stores float32 scales, the paper's own arithmetic, or to what its super-blocks can hold.
    """
    return storable(alpha.clamp(min=_SMALLEST_ALPHA) * width_of(scheme).step, scheme)


def fake_quantize(
    weight: Tensor,
    alpha: Tensor,
    scheme: Scheme,
    gradient: Gradient = "paper",
    *,
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
) -> Tensor:
    """`quantize(weight, scale).dequantize()` with ParetoQ's gradients.

    weight float32 [out, in], alpha float32 [out, groups]; returns `dtype` [out, in].

    gradient   of rounding: the `paper`'s is that of the identity. `stable` is StableQAT's
               (arXiv 2601.19320): the staircase, seen along its diagonal, is a triangle wave, and
               the slope of its first, damped harmonic is near nothing in the middle of a step and
               that of the identity where two steps meet
    dtype      that products are taken in; a cast after this function would give the same values
               and gradients, and pass over the weight twice more
    fused      by compiled code that passes over the weight once (`qexport.fused`)
    """
    out: Tensor = _FakeQuantize.apply(weight, alpha, scheme, gradient, dtype, fused)  # type: ignore[no-untyped-call]
    return out


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        alpha: Tensor,
        scheme: Scheme,
        gradient: Gradient,
        dtype: torch.dtype,
        fused: bool,
    ) -> Tensor:
        scale = effective_scale(alpha, scheme)
        quantized = compiled(_quantized) if fused else _quantized
        values, codes = quantized(weight, scale, scheme, dtype)
        ctx.save_for_backward(weight, scale, codes)  # a byte a weight, not four
        ctx.scheme, ctx.gradient, ctx.fused = scheme, gradient, fused
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        gradients = compiled(_gradients) if ctx.fused else _gradients
        # A portable scale makes the quantized value exact in float32, so that its difference from
        # the weight keeps its digits where the two are close; others need float64 for that.
        wide = torch.float64 if ctx.scheme.scale_dtype == torch.float32 else torch.float32
        weight, scale, codes = ctx.saved_tensors
        width = width_of(ctx.scheme)
        of_both = gradients(grad, weight, scale, codes, width, wide, ctx.gradient)
        return (*of_both, None, None, None, None)


def _quantized(
    weight: Tensor, scale: Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    found = quantize(weight, scale, scheme)
    return found.dequantize().to(dtype), found.codes


def _gradients(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    codes: Tensor,
    width: Width,
    wide: torch.dtype,
    gradient: Gradient,
) -> tuple[Tensor, Tensor]:
    """Those of weight and alpha, for that of the quantized values."""
    assert width.grid.zero is not None
    out, groups = scale.shape
    alpha = (scale / width.step).unsqueeze(-1)
    grad = grad.to(weight.dtype).view(out, groups, -1)
    weight = weight.view(out, groups, -1)
    units = weight / alpha
    outside = (units < width.low).logical_or_(units > width.high)
    slopes = None
    if gradient == "stable":
        slopes = _stable_slopes(units / width.step, codes.view(grad.shape), width.grid.zero)
        grad_weight = (grad * slopes).masked_fill_(outside, 0).view(codes.shape)
    else:
        grad_weight = grad.masked_fill(outside, 0).view(codes.shape)
    # dL/dalpha is the sum of grad * (quantized/alpha - (inside ? weight/alpha : 0))
    slope = codes.to(wide).view(out, groups, -1).sub_(width.grid.zero)
    slope.mul_(scale.unsqueeze(-1))
    if width.grid is not BINARY:
        inside = weight.masked_fill(outside, 0)
        slope.sub_(inside if slopes is None else inside * slopes)
    gradient_scale = 1.0 / math.sqrt(weight.numel() * width.qp)
    grad_alpha = slope.div_(alpha).mul_(grad).sum(-1).mul_(gradient_scale)
    return grad_weight, grad_alpha.to(scale.dtype)


def _stable_slopes(units: Tensor, codes: Tensor, zero: float) -> Tensor:
    """d round(v) / d v of StableQAT for v = units of a step: 2 / (1 + c cos(pi (v + round v))) - 1.

    Half-integer grids round v - 1/2, so that both terms move by a half.
    """
    middle = 2 * (zero % 1)
    angle = (units + codes.to(units.dtype) - (zero + middle)).mul_(math.pi)
    return angle.cos_().mul_(_STABLE_DAMPING).add_(1).reciprocal_().mul_(2).sub_(1)


def initial_alpha(
    weight: Tensor,
    scheme: Scheme,
    rule: Literal["paper", "mse"],
    importance: Tensor | None = None,
) -> Tensor:
    """A starting alpha float32 [out, groups] for each group of `weight` [out, in].

    `paper` is ParetoQ's rule. `mse` searches 32 fractions of the largest weight's alpha for the
    least squared error of each group, with the rounding that training will use; `importance` [in]
    are weights of the columns' errors.
    """
    width = width_of(scheme)
    weight = weight.detach().float()
    out, inputs = weight.shape
    grouped = weight.reshape(out, scheme.groups(inputs), -1)
    if rule == "paper" and width.grid is BINARY:
        return grouped.abs().mean(-1)
    largest = grouped.abs().amax(-1) / {"3": 3.0, "4": 7.0}.get(width.bits, 1.0)
    if rule == "paper":
        return largest
    scheme = replace(scheme, super_block=None)  # scales that it ties are searched one by one
    rows = max(1, _SEARCH_CHUNK // inputs)
    parts = zip(torch.split(weight, rows), torch.split(largest, rows), strict=True)
    return torch.cat([_least_squares_alpha(part, top, scheme, importance) for part, top in parts])


def _least_squares_alpha(
    weight: Tensor, largest: Tensor, scheme: Scheme, importance: Tensor | None
) -> Tensor:
    least = torch.full_like(largest, math.inf)
    alpha = largest.clone()
    for index in range(_SHRINK_FACTORS, 0, -1):
        candidate = largest * (index / _SHRINK_FACTORS)
        error = quantize(weight, effective_scale(candidate, scheme), scheme).dequantize() - weight
        error.square_()
        if importance is not None:
            error.mul_(importance)
        loss = error.view(*largest.shape, -1).sum(-1)
        better = loss < least
        least = torch.where(better, loss, least)
        alpha = torch.where(better, candidate, alpha)
    return alpha


def from_upstream(weight: Tensor, clip_val: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Codes and scales of an upstream ParetoQ layer, as its own forward computed them.

    weight [out, in] and clip_val [out, groups] in the checkpoint's dtype. Upstream divides and
    rounds in that dtype, and a bfloat16 quotient falls on the other side of a rounding boundary for
    up to 0.3 % of the weights, so the division is repeated in the same dtype here. Raises
    CheckpointError for a zero weight at 1 bit, which upstream multiplies as a third level.
    """
    width = width_of(scheme)
    alpha = clip_val.clamp(min=_SMALLEST_ALPHA).unsqueeze(-1)
    if width.grid is BINARY:
        if bool((weight == 0).any()):
            raise CheckpointError(
                "the 1-bit checkpoint has weights of exactly zero, a third level that 1 bit cannot "
                "hold; train it a step further."
            )
        codes = weight > 0
    else:
        units = weight.reshape(*clip_val.shape, -1) / alpha
        levels, shift = {"1.58": (1.5, 0.0), "2": (2.0, 0.5)}.get(width.bits, (1.0, 0.0))
        rounded = (units.clamp(width.low, width.high) * levels - shift).round() + shift
        assert width.grid.zero is not None
        codes = rounded + width.grid.zero
    scale = upstream_scale(clip_val, width).to(scheme.scale_dtype)
    return QuantizedTensor(codes.reshape(weight.shape).to(torch.uint8), scale, scheme)


def upstream_scale(clip_val: Tensor, width: Width) -> Tensor:
    """The scale of an upstream layer in the dtype, and with the roundings, of its forward."""
    step = torch.tensor(width.step, dtype=clip_val.dtype)
    return clip_val.clamp(min=_SMALLEST_ALPHA) * step
