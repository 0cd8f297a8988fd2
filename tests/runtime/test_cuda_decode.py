"""How CUDA kernels take codes apart, run on the host: decode.cuh and the order of codes."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from qexport.grid import GRIDS, Scheme
from qexport.runtime.kernels.cuda_layout import from_fragments, inputs_of_words, to_fragments
from qexport.tensor import QuantizedTensor

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "runtime" / "csrc" / "cuda"
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
def test_fragments_give_codes_back(bits: int) -> None:
    for out, spans in ((16, 1), (48, 5)):
        codes = torch.randint(0, 1 << bits, (out, spans * inputs_of_words(bits)), dtype=torch.uint8)
        words = to_fragments(codes, bits)
        assert torch.equal(from_fragments(words, bits), codes)
        assert words.numel() * 32 == codes.numel() * bits  # nothing is wasted


@needs_compiler
@pytest.mark.parametrize("bfloat16", [0, 1])
@pytest.mark.parametrize("grid", ["binary", "ternary", "seq2", "int2", "int3", "int4"])
def test_fragments_decode_to_the_reference(host: ctypes.CDLL, grid: str, bfloat16: int) -> None:
    """Codes in fragments, taken apart as a lane does, are the reference's values at scale 1."""
    scheme = Scheme(GRIDS[grid])
    bits, zero = scheme.grid.bits, scheme.grid.zero
    assert zero is not None
    out, inputs = 32, 3 * inputs_of_words(bits)
    codes = torch.randint(0, scheme.grid.levels, (out, inputs), dtype=torch.uint8)
    want = QuantizedTensor(codes, torch.ones(out, 1, dtype=torch.float16), scheme).dequantize(
        DTYPES[bfloat16]
    )
    # a lane's words lie one after the other: [tile, span, lane, words]
    words = to_fragments(codes, bits).transpose(2, 3).contiguous()
    count = words.numel() // words.shape[-1]
    registers = inputs_of_words(bits) // 16 * 4
    pairs = torch.empty(count, registers, dtype=torch.int32)
    assert not host.decode_words(
        *(bfloat16, bits, int(2 * zero), ctypes.c_void_p(words.data_ptr()), count),
        ctypes.c_void_p(pairs.data_ptr()),
    )
    numbers = pairs.view(torch.int16).view(DTYPES[bfloat16])
    found = numbers.view(out // 16, 3, 32, registers, 2)
    for lane in range(32):
        for register in range(registers):
            fragment, r = divmod(register, 4)
            row, column = lane // 4 + 8 * (r % 2), 16 * fragment + 2 * (lane % 4) + 8 * (r // 2)
            at = want.view(out // 16, 16, 3, -1)[:, row, :, column : column + 2]
            assert torch.equal(found[:, :, lane, register], at)
