"""Scales by least squares, against a search of many more."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.grid import GRIDS, Scheme
from qexport.quantization.fit import Fit, fit
from qexport.tensor import portable, quantize

NAMES = sorted(name for name, grid in GRIDS.items() if not grid.minima)


def error(weight: torch.Tensor, found: Fit, scheme: Scheme) -> float:
    made = quantize(weight, found.scale, scheme, found.zeros).dequantize()
    return float((made - weight).square().sum())


def errors(
    weight: torch.Tensor, scales: torch.Tensor, scheme: Scheme, zeros: torch.Tensor | None
) -> torch.Tensor:
    """Of one row by each of the scales [n, 1]."""
    rows = weight.expand(len(scales), -1)
    return (quantize(rows, scales, scheme, zeros).dequantize() - rows).square().sum(1)


@pytest.mark.parametrize("grid", NAMES)
def test_it_is_nearly_the_best_there_is(grid: str) -> None:
    """Of a single group, whose scales and zero points can all be tried."""
    scheme = Scheme(GRIDS[grid], None)
    torch.manual_seed(2)
    mine, best = 0.0, 0.0
    for _ in range(8):
        weight = torch.randn(1, 64) * 0.1 + 0.02
        found = fit(weight, scheme)
        widest = float(weight.abs().max()) * 4 / scheme.grid.levels
        scales, zeros = portable(widest * torch.arange(4, 401)[:, None] / 400), None
        if scheme.grid.zeros:
            zeros = torch.arange(16, dtype=torch.uint8).repeat(len(scales))[:, None]
            scales = scales.repeat_interleave(16, 0)
        mine += error(weight, found, scheme)
        best += float(errors(weight, scales, scheme, zeros).min())
    assert mine < (1.12 if scheme.grid.levels <= 16 else 1.25) * best


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.floats(-8, 4),
    st.integers(0, 2**32 - 1),
)
def test_whatever_the_weights_are(grid: str, magnitude: float, seed: int) -> None:
    """Scales are portable, and codes on the grid; nothing is worse than nothing."""
    scheme = Scheme(GRIDS[grid], 16)
    dice = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 48, generator=dice) * 10**magnitude
    weight[0, :16] = 0
    weight[1, 5] *= 1000
    found = fit(weight, scheme)
    assert torch.equal(portable(found.scale), found.scale)
    made = quantize(weight, found.scale, scheme, found.zeros)
    assert int(made.codes.max()) < scheme.grid.levels
    if magnitude > -4:
        assert float((made.dequantize() - weight).norm()) < 1.01 * float(weight.norm())


def test_a_few_ranges_alone() -> None:
    """`coarse` is quicker and worse."""
    scheme = Scheme(GRIDS["int3"], 32)
    torch.manual_seed(0)
    weight = torch.randn(16, 256)
    coarse, fine = fit(weight, scheme, coarse=True), fit(weight, scheme)
    assert error(weight, fine, scheme) < error(weight, coarse, scheme)
