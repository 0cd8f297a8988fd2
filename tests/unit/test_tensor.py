import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qexport.grid import INT3, INT4, SEQ2, UINT4, Scheme
from qexport.tensor import QuantizedTensor, portable

floats = st.floats(2.0**-30, 1e6, width=32)


@given(st.lists(floats, min_size=1, max_size=50))
def test_portable_values_and_their_halves_fit_fp16_and_bf16(values: list[float]) -> None:
    scale = portable(torch.tensor(values))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(scale.to(dtype).float(), scale)
        assert torch.equal((scale / 2).to(dtype).float(), scale / 2)
    assert torch.equal(portable(scale), scale)
    significant = np.frexp(scale.numpy().astype(np.float64))[0] * 2**8
    assert (significant == significant.astype(np.int64)).all()


@given(floats.filter(lambda v: 2.0**-23 <= v <= 65280))
def test_portable_is_the_nearest_such_value(value: float) -> None:
    found = float(portable(torch.tensor([value]))[0])
    exponent = int(np.frexp(value)[1])
    step = max(2.0 ** (exponent - 8), 2.0**-23)
    assert abs(found - value) <= step / 2


@given(st.integers(0, 2**32 - 1), st.sampled_from([SEQ2, INT3, INT4]))
def test_portable_symmetric_weights_are_exact_in_fp16(seed: int, grid: object) -> None:
    from qexport.grid import Grid

    assert isinstance(grid, Grid)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, grid.levels, (8, 32), generator=generator).to(torch.uint8)
    scales = portable(torch.rand(8, 2, generator=generator) * 0.3 + 1e-6)
    tensor = QuantizedTensor(codes, scales.half(), Scheme(grid, 16))
    assert torch.equal(tensor.dequantize(torch.float16).float(), tensor.dequantize())


def test_dequantize_is_scale_times_code_minus_zero() -> None:
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0]], dtype=torch.float16)
    tensor = QuantizedTensor(codes, scales, Scheme(SEQ2, 2))
    assert tensor.dequantize().tolist() == [[-0.75, -0.25, 1.0, 3.0]]


def test_dequantize_asymmetric() -> None:
    codes = torch.tensor([[0, 15, 7, 8]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0]], dtype=torch.float16)
    zeros = torch.tensor([[3, 8]], dtype=torch.uint8)
    tensor = QuantizedTensor(codes, scales, Scheme(UINT4, 2), zeros)
    assert tensor.dequantize().tolist() == [[-1.5, 6.0, -2.0, 0.0]]


def test_embedding_keeps_the_values() -> None:
    codes = torch.randint(0, 4, (16, 64)).to(torch.uint8)
    scales = portable(torch.rand(16, 2) + 0.01).half()
    tensor = QuantizedTensor(codes, scales, Scheme(SEQ2, 32))
    for grid in (INT3, INT4):
        assert torch.equal(tensor.embed(grid).dequantize(), tensor.dequantize())


def test_embedding_refuses_what_is_not_exact() -> None:
    codes = torch.zeros(1, 4, dtype=torch.uint8)
    smallest = torch.tensor([[2.0**-24]], dtype=torch.float16)  # its half is no fp16 number
    with pytest.raises(ValueError, match="too small"):
        QuantizedTensor(codes, smallest, Scheme(SEQ2)).embed(INT3)
    with pytest.raises(ValueError, match="does not embed"):
        QuantizedTensor(codes, smallest, Scheme(INT4)).embed(INT3)


@pytest.mark.parametrize(
    ("codes", "scales", "scheme", "zeros"),
    [
        (torch.zeros(2, 8), torch.ones(2, 1).half(), Scheme(SEQ2), None),
        (torch.zeros(2, 8).byte(), torch.ones(2, 2).half(), Scheme(SEQ2), None),
        (torch.zeros(2, 8).byte(), torch.ones(2, 1), Scheme(SEQ2), None),
        (torch.zeros(2, 8).byte(), torch.ones(2, 1).half(), Scheme(UINT4), None),
        (torch.zeros(2, 8).byte(), torch.ones(2, 1).half(), Scheme(SEQ2), torch.ones(2, 1)),
        (torch.zeros(2, 8).byte(), torch.ones(2, 1).half(), Scheme(UINT4), torch.ones(2, 2)),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    codes: torch.Tensor, scales: torch.Tensor, scheme: Scheme, zeros: torch.Tensor | None
) -> None:
    with pytest.raises(ValueError, match=r"codes|scales|zero points"):
        QuantizedTensor(codes, scales, scheme, zeros)
