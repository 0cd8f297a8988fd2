"""Scales and minima of K-quants: what a super-block of GGUF can hold, by least squares.

In a super-block of 256 inputs every group has a whole factor of one float16 `d`, and where the grid
has minima, another of `dmin`. Groups are fitted by themselves first, as llama.cpp does; then
factors are taken to their neighbours, and `d` and `dmin` fitted to the factors and codes, in turns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.grid import Scheme, SuperBlock
from qexport.quantization.fit import Fit

__all__ = ["fit_super_blocks"]

_CHUNK = 1 << 18  # weights searched at a time
_ROUNDS = 2
_TRIED = torch.linspace(-0.4, 1.0, 15).tolist()  # levels that a range is widened by
_SHRUNK = torch.linspace(1.0, 0.55, 19).tolist()
_TINY = 1e-12


def fit_super_blocks(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Fit:
    """The scales (and minima) of least squared error for `weight` float32 [out, in].

    importance   float [in], weights of the columns' errors: how much each input matters
    """
    assert scheme.super_block is not None
    matters = torch.ones_like(weight[0]) if importance is None else importance
    rows = max(1, _CHUNK // weight.shape[1])
    parts = [_fit(part, scheme.super_block, matters) for part in torch.split(weight, rows)]
    minima = [part.minima for part in parts if part.minima is not None]
    scale = torch.cat([part.scale for part in parts])
    return Fit(scale, None, torch.cat(minima) if minima else None)


@dataclass
class _Groups:
    """Weights [out, groups, n] and how much they matter, on the grid of `block`."""

    weight: Tensor
    matters: Tensor
    block: SuperBlock

    def codes(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """What scales [out, groups] are multiplied by, before a minimum is taken off."""
        grid = self.block.grid
        zero = grid.zero or 0.0
        steps = ((self.weight + minimum.unsqueeze(-1)) / scale.unsqueeze(-1)).round_()
        return steps.clamp_(-zero, grid.levels - 1 - zero)

    def error(self, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """[out, groups], in squares."""
        made = codes * scale.unsqueeze(-1) - minimum.unsqueeze(-1)
        return self.sums((made - self.weight).square_())

    def sums(self, values: Tensor) -> Tensor:
        """Of each group, by how much they matter."""
        return (values * self.matters).sum(-1)

    def shared(self, values: Tensor) -> Tensor:
        """[out, groups] as [out, super-blocks, groups]."""
        return values.view(len(values), -1, self.block.size // self.block.group_size)


def _fit(weight: Tensor, block: SuperBlock, importance: Tensor) -> Fit:
    size = block.group_size
    groups = _Groups(weight.view(len(weight), -1, size), importance.view(-1, size), block)
    scale, minimum = (_affine if block.grid.minima else _symmetric)(groups)
    d, dmin = _largest(groups.shared(scale), block), _largest(groups.shared(minimum), block)
    multiples = _multiples(scale, _spread(groups, d), block.least, block.most)
    offsets = _multiples(minimum, _spread(groups, dmin), 0, block.most)
    for _ in range(_ROUNDS):
        multiples, offsets = _neighbours(groups, d, dmin, multiples, offsets)
        d, dmin = _refit(groups, d, dmin, multiples, offsets)
    multiples, offsets = _neighbours(groups, d, dmin, multiples, offsets)
    scale = _spread(groups, d) * multiples
    return Fit(scale, None, _spread(groups, dmin) * offsets if block.grid.minima else None)


def _affine(groups: _Groups) -> tuple[Tensor, Tensor]:
    """Scale and minimum [out, groups] of each group by itself: of codes at many widths, the best.

    A minimum is not negative: zero is always within the range.
    """
    low = groups.weight.amin(-1).clamp(max=0)
    high = groups.weight.amax(-1).clamp(min=0)
    top = groups.block.grid.levels - 1
    whole = groups.sums(torch.ones_like(groups.weight))
    first = groups.sums(groups.weight)
    scale, minimum = ((high - low) / top).clamp(min=_TINY), -low
    best = groups.error(groups.codes(scale, minimum), scale, minimum)

    def consider(codes: Tensor) -> None:
        nonlocal scale, minimum, best
        ones, squares = groups.sums(codes), groups.sums(codes * codes)
        both = groups.sums(codes * groups.weight)
        spread = (whole * squares - ones * ones).clamp(min=_TINY**2)
        mine = (whole * both - first * ones) / spread
        least = (ones * both - squares * first) / spread
        without = both / squares.clamp(min=_TINY**2)
        mine = torch.where(least < 0, without, mine)
        least = least.clamp(min=0)
        error = groups.error(codes, mine, least)
        better = (error < best) & (mine > _TINY)
        scale, minimum = torch.where(better, mine, scale), torch.where(better, least, minimum)
        best = torch.where(better, error, best)

    for wider in _TRIED:
        for part in (1.0, 0.85) if top <= 3 else (1.0,):
            tried = ((high - low * part) / (top + wider - 0.5)).clamp(min=_TINY)
            consider(groups.codes(tried, -low * part))
    for _ in range(_ROUNDS):
        consider(groups.codes(scale, minimum))
    return scale, minimum


def _symmetric(groups: _Groups) -> tuple[Tensor, Tensor]:
    """Scale of either sign [out, groups] of each group by itself, and no minimum."""
    zero = groups.block.grid.zero
    assert zero is not None
    low, high = -groups.weight.amin(-1), groups.weight.amax(-1)
    none = torch.zeros_like(low)
    scale = best = none
    for sign in (1.0, -1.0):
        down, up = (low, high) if sign > 0 else (high, low)
        widest = torch.maximum(down / zero, up / (groups.block.grid.levels - 1 - zero))
        for shrink in _SHRUNK:
            tried = (widest * shrink).clamp(min=_TINY) * sign
            codes = groups.codes(tried, none)
            squares = groups.sums(codes * codes)
            mine = groups.sums(codes * groups.weight) / squares.clamp(min=_TINY**2)
            gain = mine * mine * squares  # of the error that nothing at all makes
            better = (gain > best) & (mine.abs() > _TINY)
            scale, best = torch.where(better, mine, scale), torch.where(better, gain, best)
    return torch.where(scale == 0, _TINY, scale), none


def _largest(values: Tensor, block: SuperBlock) -> Tensor:
    """Float16 steps [out, super-blocks] by which the largest of `values` is a factor of `most`.

    A negative factor reaches one farther.
    """
    top = values.amax(-1).clamp(min=0) / block.most
    if block.least < 0:
        top = torch.maximum(top, -values.amin(-1) / -block.least)
    return _half(top)


def _half(values: Tensor) -> Tensor:
    """Positive values as float16 has them, none of them nothing."""
    return values.clamp(2.0**-24, 65504.0).to(torch.float16).float()


def _spread(groups: _Groups, values: Tensor) -> Tensor:
    """[out, super-blocks] as [out, groups]."""
    return values.repeat_interleave(groups.block.size // groups.block.group_size, dim=1)


def _multiples(values: Tensor, step: Tensor, least: int, most: int) -> Tensor:
    """The nearest whole factors; never nothing where they are scales."""
    found = (values / step).round().clamp(least, most)
    if least < 0:
        found = torch.where(found == 0, 1.0, found)
    return found


def _neighbours(
    groups: _Groups, d: Tensor, dmin: Tensor, multiples: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors, or those next to them, whichever make the least error together."""
    block = groups.block
    step, low = _spread(groups, d), _spread(groups, dmin)
    best = torch.full_like(step, torch.inf)
    found, lows = multiples, offsets
    for up in (0, -1, 1):
        scale_of = (multiples + up).clamp(block.least, block.most)
        scale_of = torch.where(scale_of == 0, multiples, scale_of)
        for down in (0, -1, 1) if block.grid.minima else (0,):
            low_of = (offsets + down).clamp(0, block.most)
            scale, minimum = step * scale_of, low * low_of
            error = groups.error(groups.codes(scale, minimum), scale, minimum)
            better = error < best
            best = torch.where(better, error, best)
            found, lows = torch.where(better, scale_of, found), torch.where(better, low_of, lows)
    return found, lows


def _refit(
    groups: _Groups, d: Tensor, dmin: Tensor, multiples: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """`d` and `dmin` of least error for factors and codes; as they were where that says nothing."""
    scale, minimum = _spread(groups, d) * multiples, _spread(groups, dmin) * offsets
    units = groups.codes(scale, minimum) * multiples.unsqueeze(-1)
    lows = -offsets.unsqueeze(-1).expand_as(units)

    def sums(values: Tensor) -> Tensor:
        return groups.shared(groups.sums(values)).sum(-1)

    uu, ul, ll = sums(units * units), sums(units * lows), sums(lows * lows)
    uw, lw = sums(units * groups.weight), sums(lows * groups.weight)
    whole = uu * ll - ul * ul
    both = whole > 1e-6 * uu * ll
    new_d = torch.where(both, (ll * uw - ul * lw) / whole, (uw - ul * dmin) / uu)
    new_dmin = torch.where(both, (uu * lw - ul * uw) / whole, dmin)
    sound = new_d.isfinite() & (new_d > 0) & new_dmin.isfinite() & (new_dmin >= 0)
    return (
        _half(torch.where(sound, new_d, d)),
        _half(torch.where(sound, new_dmin, dmin)),
    )
