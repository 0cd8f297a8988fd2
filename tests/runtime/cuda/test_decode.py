"""How CUDA kernels take codes apart, run on the host: decode.cuh and the order of codes."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from qexport.grid import GRIDS, Scheme
from qexport.runtime.kernels.cuda_layout import (
    chunk_inputs,
    pack_codes,
    pack_scales,
    span_inputs,
    unpack_codes,
)
from qexport.tensor import QuantizedTensor

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "runtime" / "csrc" / "cuda"
COMPILER = shutil.which("g++") or shutil.which("clang++")
DTYPES = {0: torch.float16, 1: torch.bfloat16}
# bits, twice the zero point
CASES = [(1, 1), (2, 0), (2, 2), (2, 3), (2, 4), (3, 0), (3, 8), (4, 0), (4, 16)]

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    assert COMPILER is not None
    library = tmp_path_factory.mktemp("decode") / "decode.so"
    command = [COMPILER, "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{SOURCES}"]
    subprocess.run([*command, "decode_host.cpp", "-o", str(library)], check=True, cwd=HERE)
    found = ctypes.CDLL(str(library))
    found.exhaust.restype = ctypes.c_long
    return found


@needs_compiler
@pytest.mark.parametrize("bfloat16", [0, 1])
@pytest.mark.parametrize(("bits", "twice_zero"), CASES)
def test_every_code_in_every_place(
    host: ctypes.CDLL, bfloat16: int, bits: int, twice_zero: int
) -> None:
    assert host.exhaust(bfloat16, bits, twice_zero) == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_packed_codes_come_back(bits: int) -> None:
    chunk = chunk_inputs(bits)
    for out, inputs in ((16, chunk), (48, 5 * chunk), (5, chunk + 24)):
        codes = torch.randint(0, 1 << bits, (out, inputs), dtype=torch.uint8)
        words = pack_codes(codes, bits)
        found = unpack_codes(words, bits)
        assert torch.equal(found[:out, :inputs], codes)
        assert not found[out:].any() and not found[:, inputs:].any()
        assert words.numel() * 32 == found.numel() * bits  # nothing is wasted


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (2, 96), (3, 64), (4, 256), (1, None)])
def test_scales_lie_where_lanes_look(bits: int, group: int | None) -> None:
    out, inputs, chunk = 21, 768, chunk_inputs(bits)
    scales = torch.randn(out, 1 if group is None else inputs // group)
    packed = pack_scales(scales, inputs, group, bits)
    span = span_inputs(group, bits)
    for row in range(out):
        tile, upper, lane = row // 16, row % 16 // 8, row % 8
        if group is None:
            assert packed[tile, lane, upper] == scales[row, 0]
            continue
        for at in range(0, inputs, span):
            found = packed[tile, at // chunk, lane, at % chunk // span, upper]
            assert found == scales[row, at // group]


@needs_compiler
@pytest.mark.parametrize("bfloat16", [0, 1])
@pytest.mark.parametrize("grid", ["binary", "ternary", "seq2", "int2", "int3", "int4"])
def test_fragments_decode_to_the_reference(host: ctypes.CDLL, grid: str, bfloat16: int) -> None:
    """Codes in fragments, taken apart as a lane does, are the reference's values at scale 1."""
    scheme = Scheme(GRIDS[grid])
    bits, zero = scheme.grid.bits, scheme.grid.zero
    assert zero is not None
    out, inputs = 32, 3 * chunk_inputs(bits)
    codes = torch.randint(0, scheme.grid.levels, (out, inputs), dtype=torch.uint8)
    want = QuantizedTensor(codes, torch.ones(out, 1, dtype=torch.float16), scheme).dequantize(
        DTYPES[bfloat16]
    )
    # all words of a lane, one after the other: [tile, lane, words]
    words = pack_codes(codes, bits).transpose(2, 3).transpose(1, 2).contiguous()
    fragments = inputs // 16
    pairs = torch.empty(2, 32, fragments, 4, dtype=torch.int32)
    decoded = {1: 1, 2: 1, 3: 3, 4: 1}[bits]
    assert not host.decode_words(
        *(bfloat16, bits, int(2 * zero), ctypes.c_void_p(words.data_ptr())),
        *(words.numel() // decoded, ctypes.c_void_p(pairs.data_ptr())),
    )
    found = pairs.view(torch.int16).view(DTYPES[bfloat16]).view(2, 32, fragments, 4, 2)
    for lane in range(32):
        for r in range(4):
            row, column = lane // 4 + 8 * (r % 2), 2 * (lane % 4) + 8 * (r // 2)
            at = want.view(2, 16, fragments, 16)[:, row, :, column : column + 2]
            assert torch.equal(found[:, lane, :, r], at)
