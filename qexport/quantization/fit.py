"""Scales and zero points of weights that are to be rounded, by least squares."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qexport.grid import Grid, Scheme
from qexport.tensor import QuantizedTensor, portable, quantize, storable

__all__ = ["Fit", "fit", "fit_tensor"]

_RANGES = 33
_REFITS = 2
_CHUNK = 1 << 18  # weights searched at a time, so that the candidates stay in the cache


@dataclass(frozen=True)
class Fit:
    """scale float32 [out, groups], as a scheme stores it; zeros uint8 or minima float32 likewise,
    of grids that have them."""

    scale: Tensor
    zeros: Tensor | None = None
    minima: Tensor | None = None

    def codes(self, weight: Tensor, scheme: Scheme) -> QuantizedTensor:
        """The nearest ones of `weight` [out, in]."""
        return quantize(weight, self.scale, scheme, self.zeros, self.minima)

    def columns(self, groups: Tensor) -> "list[Fit]":
        """A column's own, for each of these groups: all [out, 1]."""
        parts = [
            [None] * len(groups) if part is None else part.T[groups].unsqueeze(-1).unbind()
            for part in (self.scale, self.zeros, self.minima)
        ]
        return [Fit(*each) for each in zip(*parts, strict=True)]


def fit(
    weight: Tensor, scheme: Scheme, importance: Tensor | None = None, *, coarse: bool = False
) -> Fit:
    """The scales (and zero points) of least squared error for each group of `weight` [out, in].

    Ranges are shrunk step by step, since clipping a few weights costs less than coarse steps for
    all of them; what comes out is improved by the least-squares scale of its own codes.

    importance   float [in], weights of the columns' errors: how much each input matters
    coarse       try a few ranges alone, where this is done many times
    """
    alone = replace(scheme, super_block=None)  # scales that it ties are searched one by one
    rows = max(1, _CHUNK // weight.shape[1])
    parts = [_fit(part, alone, importance, coarse=coarse) for part in torch.split(weight, rows)]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    scale = storable(torch.cat([part.scale for part in parts]), scheme)
    return Fit(scale, torch.cat(zeros) if zeros else None)


def fit_tensor(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Fit:
    """One scale (and zero point) for all of `weight`, given for every channel: [out, 1]."""
    out = len(weight)
    matters = None if importance is None else importance.repeat(out)
    found = _fit(weight.reshape(1, -1), scheme, matters, coarse=False)
    zeros = None if found.zeros is None else found.zeros.expand(out, 1).contiguous()
    return Fit(found.scale.expand(out, 1).contiguous(), zeros)


def _fit(weight: Tensor, scheme: Scheme, importance: Tensor | None, *, coarse: bool) -> Fit:
    out, inputs = weight.shape
    grouped = weight.reshape(out, scheme.groups(inputs), -1)
    best = _Best(weight, scheme, importance)
    for shrink in _shrinks(scheme.grid, 6 if coarse else _RANGES):
        if scheme.grid.zeros:
            _try_ranges(best, grouped, scheme.grid, shrink)
        else:
            best.consider(portable(_widest(grouped, scheme.grid) * shrink), None)
    for _ in range(0 if coarse else _REFITS):
        best.refit()
    return Fit(best.scale, best.zeros)


def _shrinks(grid: Grid, count: int) -> list[float]:
    """Of the range that clips nothing; the more levels there are, the less is worth clipping."""
    least = 0.2 if grid.levels <= 4 else 0.45 if grid.levels <= 16 else 0.8
    shrinks: list[float] = torch.linspace(1.0, least, count).tolist()
    return shrinks


def _widest(grouped: Tensor, grid: Grid) -> Tensor:
    """The scale [out, groups] that clips no weight, on a symmetric grid or a codebook."""
    if grid.values is not None:
        low, high = grid.values[0], grid.values[-1]
    else:
        assert grid.zero is not None
        low, high = -grid.zero, grid.levels - 1 - grid.zero
    return torch.maximum(grouped.amax(-1) / high, grouped.amin(-1) / low)


def _try_ranges(best: "_Best", grouped: Tensor, grid: Grid, shrink: float) -> None:
    """Zero points next to that of the range too: there are few, and rounding them costs much."""
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = portable((high - low) * (shrink / (grid.levels - 1)))
    middle = (-low * shrink / scale).round()
    for step in (0, -1, 1) if grid.levels <= 16 else (0,):
        best.consider(scale, (middle + step).clamp(0, grid.levels - 1).to(torch.uint8))


class _Best:
    """The best scale so far of each group."""

    def __init__(self, weight: Tensor, scheme: Scheme, importance: Tensor | None) -> None:
        self._weight = weight
        self._scheme = scheme
        self._importance = importance
        groups = (len(weight), scheme.groups(weight.shape[1]))
        self._error = torch.full(groups, math.inf, device=weight.device)
        self.scale = torch.ones(groups, device=weight.device)
        self.zeros: Tensor | None = None
        if scheme.grid.zeros:
            self.zeros = torch.zeros(groups, dtype=torch.uint8, device=weight.device)

    def consider(self, scale: Tensor, zeros: Tensor | None) -> None:
        """Take what is better of this one."""
        made = quantize(self._weight, scale, self._scheme, zeros).dequantize()
        error = self._sums((made - self._weight).square_())
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        if zeros is not None:
            assert self.zeros is not None
            self.zeros = torch.where(better, zeros, self.zeros)

    def refit(self) -> None:
        """Consider the least-squares scale of the codes that the best one has."""
        codes = quantize(self._weight, self.scale, self._scheme, self.zeros)
        units = codes.dequantize() / self._spread(self.scale)
        scale = self._sums(units * self._weight) / self._sums(units * units)
        usable = scale.isfinite() & (scale > 0)
        self.consider(portable(torch.where(usable, scale, self.scale)), self.zeros)

    def _spread(self, scale: Tensor) -> Tensor:
        """[out, groups] as [out, in]."""
        width = self._weight.shape[1] // scale.shape[1]
        return scale.repeat_interleave(width, dim=1)

    def _sums(self, values: Tensor) -> Tensor:
        """Of each group, weighted by importance: [out, in] to [out, groups]."""
        if self._importance is not None:
            values = values * self._importance
        return values.view(*self._error.shape, -1).sum(-1)
