"""Scales of eight bits: what is rounded is found again, to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qexport.double_quant import BLOCK, doubled, redoubled, undoubled
from qexport.tensor import portable


@given(
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(-30, 10),
    st.floats(0, 10),
    st.integers(0, 2**32 - 1),
)
def test_there_and_back(out: int, groups: int, exponent: int, spread: float, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    scale = 2.0 ** (exponent + spread * torch.rand(out, groups, generator=dice))
    made = doubled(scale)
    codes, largest = undoubled(made)
    assert codes.dtype == torch.uint8 and len(largest) == -(-out * groups // BLOCK)
    assert torch.equal(redoubled(codes, largest), made)
    assert torch.equal(doubled(made), made)
    top = torch.nn.functional.pad(scale.flatten(), (0, -scale.numel() % BLOCK)).view(-1, BLOCK)
    step = top.amax(-1).repeat_interleave(BLOCK)[: scale.numel()].view(scale.shape) / 256
    assert bool(((made - scale).abs() <= 1.01 * step).all())


def test_other_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="not those of a double quantization"):
        undoubled(portable(torch.rand(8, 8) + 0.1))
