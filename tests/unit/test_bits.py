"""The packer against a bit-by-bit reading of its own description, and literal bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qexport import bits


def slow_pack(row: list[int], width: int) -> bytes:
    stream = sum(code << (width * j) for j, code in enumerate(row))
    return stream.to_bytes((len(row) * width + 7) // 8, "little")


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_packs_the_stream_and_back(width: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << width, (rows, count), generator=generator).to(torch.uint8)
    packed = bits.pack(codes, width)
    assert [bytes(row.tolist()) for row in packed] == [slow_pack(r.tolist(), width) for r in codes]
    assert torch.equal(bits.unpack(packed, width, count), codes)


def test_three_bit_codes_straddle_bytes() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    # 1 | 2<<3 | 3<<6 | 4<<9 | 5<<12 | 6<<15 | 7<<18
    assert bits.pack(codes, 3).tolist() == [[0xD1, 0x58, 0x1F]]


def test_two_bit_codes_start_at_the_low_end() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 3]], dtype=torch.uint8)
    assert bits.pack(codes, 2).tolist() == [[0b11100100, 0b00000011]]


def test_long_matrices_go_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "_CHUNK", 64)
    codes = torch.randint(0, 8, (37, 33)).to(torch.uint8)
    assert torch.equal(bits.unpack(bits.pack(codes, 3), 3, 33), codes)


@pytest.mark.parametrize(
    ("codes", "width"),
    [
        (torch.zeros(1, 4, dtype=torch.uint8), 9),
        (torch.zeros(1, 4, dtype=torch.uint8), 0),
        (torch.zeros(1, 4, dtype=torch.int32), 4),
        (torch.zeros(4, dtype=torch.uint8), 4),
        (torch.full((1, 4), 8, dtype=torch.uint8), 3),
    ],
)
def test_refuses_what_it_cannot_pack(codes: Tensor, width: int) -> None:
    with pytest.raises(ValueError, match=r"bits|uint8"):
        bits.pack(codes, width)


def test_refuses_to_unpack_rows_of_another_length() -> None:
    with pytest.raises(ValueError, match="take 3 bytes a row, not 4"):
        bits.unpack(torch.zeros(2, 4, dtype=torch.uint8), 3, 8)
