"""GGUF blocks: codes and values against gguf-py's, and what their bytes promise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.formats.gguf.blocks import BLOCKS
from qexport.formats.gguf.rounding import round_to_q6_k, round_to_q8_0
from tests.formats import decoders as second
from tests.formats.gguf_files import KNOWN, random_blocks


@pytest.mark.parametrize("name", KNOWN)
def test_blocks_are_read_as_gguf_py_reads_them(name: str) -> None:
    raw = random_blocks(BLOCKS[name], 16, 8, 1)
    mine = BLOCKS[name].decode(torch.from_numpy(raw)).weights().numpy()
    theirs = dequantize(raw.reshape(16, -1), gguf.GGMLQuantizationType[name])
    assert np.array_equal(mine.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize(
    ("name", "decode"), [("Q1_0", second.ggml_q1_0), ("Q2_0", second.ggml_q2_0)]
)
def test_blocks_that_gguf_py_lacks(name: str, decode: Callable[..., Any]) -> None:
    raw = random_blocks(BLOCKS[name], 4, 8, 2)
    mine = BLOCKS[name].decode(torch.from_numpy(raw)).weights().numpy()
    theirs = decode(raw.reshape(-1, BLOCKS[name].bytes)).reshape(4, -1)
    assert np.array_equal(mine.view(np.uint32), theirs.view(np.uint32))


def test_golden_blocks() -> None:
    """Literal bytes, so that encoder and decoder cannot drift together."""
    half = bytes([0x00, 0x38])  # float16 0.5
    one = torch.ones(1, 1, dtype=torch.float16) / 2
    ternary = torch.tensor([0, 1, 2, 1] * 16, dtype=torch.uint8).view(1, 1, 64)
    block = BLOCKS["Q2_0"]
    assert bytes(block.encode(block.holds[0], ternary, one, None).flatten().tolist()) == (
        half + bytes([0b01100100] * 16)
    )
    signs = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1] * 16, dtype=torch.uint8).view(1, 1, 128)
    block = BLOCKS["Q1_0"]
    assert bytes(block.encode(block.holds[0], signs, one * 2, None).flatten().tolist()) == (
        half + bytes([0b10000001] * 16)
    )
    seq = torch.arange(256).div(64, rounding_mode="floor").to(torch.uint8).view(1, 1, 256)
    block = BLOCKS["Q2_K"]
    raw = bytes(block.encode(block.holds[0], seq, one * 2, None).flatten().tolist())
    # planes of 32 in each half: codes 0 0 1 1, then 2 2 3 3, lowest plane in the lowest bits
    assert raw == bytes([0x32] * 16 + [0b01010000] * 32 + [0b11111010] * 32) + half + half


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(BLOCKS)), st.integers(0, 2**32 - 1))
def test_blocks_give_back_every_code(name: str, seed: int) -> None:
    block = BLOCKS[name]
    generator = torch.Generator().manual_seed(seed)
    for grid in block.holds:
        if grid.minima:
            continue  # see tests/quantize/test_kquant.py
        codes = torch.randint(0, grid.levels, (2, 3, block.size), generator=generator).byte()
        scales = (torch.rand(2, 3, generator=generator) + 0.01).bfloat16().half()
        zeros = None
        if grid.zeros:
            zeros = torch.randint(0, grid.levels, (2, 3), generator=generator).byte()
        decoded = block.decode(block.encode(grid, codes, scales, zeros))
        middle = grid.middle if zeros is None else zeros.float().unsqueeze(-1)
        units = codes.float() - middle
        if grid.values is not None:
            units = torch.tensor(grid.values)[codes.int()]
        expected = units * scales.float().unsqueeze(-1)
        assert torch.equal(decoded.codes, codes.view(2, -1))
        assert torch.equal(decoded.weights(), expected.view(2, -1))


@pytest.mark.parametrize(("round_to", "name"), [(round_to_q8_0, "Q8_0"), (round_to_q6_k, "Q6_K")])
def test_rounded_embeddings_are_near(round_to: Callable[..., torch.Tensor], name: str) -> None:
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    raw = round_to(weight)
    theirs = dequantize(raw.flatten(1).numpy(), gguf.GGMLQuantizationType[name])
    error = np.abs(theirs - weight.numpy()).max()
    assert error < weight.abs().max() / {"Q8_0": 200, "Q6_K": 50}[name]


def test_one_block_alone_is_read(tmp_path: Path) -> None:
    for block in BLOCKS.values():
        raw = random_blocks(block, 1, 1, 5)
        assert block.decode(torch.from_numpy(raw)).codes.shape == (1, block.size)
