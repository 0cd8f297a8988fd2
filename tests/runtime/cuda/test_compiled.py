"""CUDA kernels compiled for GPUs that are not here: NVRTC, nvcc, and what the kernels take."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cuda_decode import tool
from benchmarks.cuda_resources import RESULT, measure, measure_dense
from qexport.runtime.kernels.cuda_matmul import dense_text, matmul_text
from qexport.runtime.kernels.cuda_source import Tile, WeightKind, compiled
from qexport.runtime.kernels.cuda_tiles import tile_for
from qexport.runtime.kernels.nvrtc import compile_cubin
from tests.runtime.cuda.emulated import SOURCES

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="NVRTC and triton are dependencies of tests on Linux only"
)
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100")
SEQ2 = WeightKind(2, 3, False, 128, torch.float16)
INT3 = WeightKind(3, 8, False, 32, torch.float16)
UINT4 = WeightKind(4, 0, True, 128, torch.float16)
BINARY = WeightKind(1, 1, False, 0, torch.float16)


@pytest.fixture(scope="module")
def committed() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(RESULT.read_text())
    return found


def rows(committed: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for architecture, found in committed.items():
        if architecture != "nvrtc":
            yield from ((architecture, row) for row in found)


def test_no_spills(committed: dict[str, Any]) -> None:
    """By the committed table: none where weights are a stream, and none in dequantizing."""
    few = [(name, row) for name, row in rows(committed) if row.get("tokens", 1) <= 16]
    assert {name for name, _ in few} >= set(ARCHITECTURES)
    assert not [(name, row) for name, row in few if row["stack"] or row["spilled"]]


@pytest.mark.parametrize(
    ("architecture", "kind", "tokens"),
    [
        *((architecture, SEQ2, 1) for architecture in ARCHITECTURES),
        ("sm_80", INT3, 64),
        ("sm_89", UINT4, 16),
        ("sm_90a", INT3, 64),
        ("sm_90a", BINARY, 512),
        ("sm_100", UINT4, 32),
    ],
    ids=str,
)
def test_the_committed_table_is_of_these_kernels(
    committed: dict[str, Any], architecture: str, kind: WeightKind, tokens: int
) -> None:
    row = measure(architecture, kind, tokens, torch.bfloat16)
    row = json.loads(json.dumps(row))
    assert row in committed[architecture]


def test_dense_kernels_compile_everywhere(committed: dict[str, Any]) -> None:
    for architecture, kind in zip(ARCHITECTURES, (SEQ2, INT3, UINT4, BINARY), strict=True):
        row = measure_dense(architecture, kind, torch.bfloat16)
        assert row in committed[architecture]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_takes_every_source(architecture: str, tmp_path: Path) -> None:
    tile = Tile(1, 8, 4, 2, 4, 1, 1, wgmma=architecture == "sm_90a")
    texts = [
        matmul_text(UINT4, tile, torch.float16),
        dense_text(INT3, torch.bfloat16),
    ]
    for index, text in enumerate(texts):
        source = tmp_path / f"{index}.cu"
        source.write_text(text)
        target = f"-gencode=arch=compute_{architecture[3:]},code={architecture}"
        command = ["nvcc", "-std=c++17", target, "-Xptxas", "-v", "-cubin", f"-I{SOURCES}"]
        done = subprocess.run(
            [*command, str(source), "-o", str(tmp_path / "kernel.cubin")],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        # C7510 and the like: wgmma that the assembler would not leave to run by itself
        assert "serializ" not in done.stderr and "C75" not in done.stderr, done.stderr


_SHAPES = {"64x16x16": 8, "64x32x16": 16, "64x64x16": 32, "64x128x16": 64}
_OPERATION = re.compile(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.a-z]+)\s*(.*?);")


def written_in_flight(listing: str) -> list[str]:
    """Instructions that write registers of a wgmma that has not been waited for.

    The assembler knows that its results are under way, but may give away registers that it still
    reads: those of a constant, which can be loaded anew wherever it is next wanted.
    """
    groups: list[set[int]] = []
    current: set[int] = set()
    wrong = []
    for line in listing.splitlines():
        found = _OPERATION.match(line)
        if found is None:
            continue
        operation, operands = found.groups()
        if operation.startswith("HGMMA"):
            into, of = map(int, re.findall(r"R(\d+)", operands)[:2])
            wide = _SHAPES[operation.split(".")[1]]
            current |= {*range(into, into + wide), *range(of, of + 4)}
            if "gsb0" in operands:
                groups, current = [*groups, current], set()
        elif operation.startswith("WARPGROUP.DEPBAR"):
            pending = int(operands.split(",")[1], 16)
            groups = groups[len(groups) - pending :] if pending else []
        elif target := re.match(r"R(\d+)$", operands.split(",")[0].strip()):
            wide = (
                4 if ".128" in operation else 2 if ".64" in operation or "WIDE" in operation else 1
            )
            registers = set(range(int(target.group(1)), int(target.group(1)) + wide))
            if registers & current.union(*groups) and not operation.startswith(
                ("ST", "BAR", "RED")
            ):
                wrong.append(line.strip())
    return wrong


def listing_of(cubin: bytes, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [str(tool("nvdisasm")), "-c", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


ZEROS = [WeightKind(bits, 0, True, span, torch.float16) for bits, span in ((2, 128), (3, 0))]


@pytest.mark.parametrize("tokens", [32, 64, 512])
@pytest.mark.parametrize("kind", [SEQ2, INT3, UINT4, BINARY, *ZEROS], ids=str)
def test_wgmma_reads_what_was_there(kind: WeightKind, tokens: int, tmp_path: Path) -> None:
    tile = tile_for("sm_90a", kind, tokens)
    assert tile.wgmma
    listing = listing_of(compiled(matmul_text(kind, tile, torch.float16), "sm_90a"), tmp_path)
    assert "HGMMA" in listing
    assert written_in_flight(listing) == []


def test_a_constant_that_is_given_away_is_seen(tmp_path: Path) -> None:
    """Without `in_register` the assembler does what the test above is for."""
    text = matmul_text(ZEROS[0], tile_for("sm_90a", ZEROS[0], 64), torch.float16)
    sources = {path.name: path.read_text() for path in SOURCES.glob("*.cuh")}
    plain = sources["matmul.cuh"].replace("in_register<both<F>(65536)>()", "both<F>(65536)")
    assert plain != sources["matmul.cuh"]
    cubin = compile_cubin("k.cu", {**sources, "matmul.cuh": plain, "k.cu": text}, "sm_90a")
    assert written_in_flight(listing_of(cubin, tmp_path)) != []
