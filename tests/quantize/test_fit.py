"""Scales by least squares, against a search of many more."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.grid import GRIDS, Scheme
from qexport.quantization.fit import fit
from qexport.tensor import portable, quantize

NAMES = sorted(name for name, grid in GRIDS.items() if not grid.minima)


def error(weight: torch.Tensor, scale: torch.Tensor, scheme: Scheme, zeros: object) -> float:
    made = quantize(weight, scale, scheme, zeros).dequantize()  # type: ignore[arg-type]
    return float((made - weight).square().sum())


@pytest.mark.parametrize("grid", NAMES)
def test_it_is_nearly_the_best_there_is(grid: str) -> None:
    """Of a single group, whose scales and zero points can all be tried."""
    scheme = Scheme(GRIDS[grid], None)
    torch.manual_seed(2)
    mine, best = 0.0, 0.0
    for _ in range(8):
        weight = torch.randn(1, 64) * 0.1 + 0.02
        found = fit(weight, scheme)
        points: list[torch.Tensor | None] = [None]
        if scheme.grid.zeros:
            points = [torch.tensor([[zero]], dtype=torch.uint8) for zero in range(16)]
        widest = float(weight.abs().max()) * 4 / scheme.grid.levels
        tried = [
            error(weight, portable(torch.tensor([[widest * i / 400]])), scheme, zeros)
            for i in range(4, 401)
            for zeros in points
        ]
        mine += error(weight, found.scale, scheme, found.zeros)
        best += min(tried)
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
    assert error(weight, fine.scale, scheme, None) < error(weight, coarse.scale, scheme, None)
