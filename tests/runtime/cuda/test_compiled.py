"""CUDA kernels compiled for GPUs that are not here: NVRTC, nvcc, and what the kernels take."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cuda_resources import RESULT, measure, measure_dense
from qexport.runtime.kernels.cuda_source import (
    Tile,
    WeightKind,
    dense_instance,
    matmul_instance,
    text_of,
)
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
        text_of("matmul.cuh", "qx::Problem", matmul_instance(UINT4, tile, torch.float16), 256),
        text_of("dequantize.cuh", "qx::Dense", dense_instance(INT3, torch.bfloat16), 128),
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
