"""Every grid and group size against every format: what the verdict says is what the bytes prove."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray

from qexport.checkpoint import Checkpoint
from qexport.errors import RefusedError
from qexport.formats import FORMATS, Options, Verdict, detect, open_checkpoint
from qexport.formats.gguf.container import GgufFile
from qexport.formats.gguf.names import to_gguf
from qexport.formats.pack import pack
from qexport.formats.table import TABLE_GRIDS
from qexport.grid import Scheme
from tests.formats import decoders
from tests.formats.models import decoder_layer, taken_by
from tests.formats.test_native import spec_decode

GRIDS = [grid.name for grid in TABLE_GRIDS]
GROUPS = [None, 32, 64, 128]
LAYER = "model.layers.0"
# o_proj, whose rows llama.cpp leaves in their order, and q_proj, whose rows it permutes
MODULES = [f"{LAYER}.self_attn.o_proj", f"{LAYER}.self_attn.q_proj"]


def gguf_tensor(path: Path, module: str, verdict: Verdict, shape: tuple[int, int]) -> object:
    """A matrix as gguf-py reads it, or by the second decoders for types that it cannot."""
    name = to_gguf(f"{module}.weight")
    assert name is not None
    blocks = {"Q1_0": (128, decoders.ggml_q1_0), "Q2_0": (64, decoders.ggml_q2_0)}
    if verdict.stored in blocks:
        size, decode = blocks[verdict.stored]
        raw = GgufFile(path).data(name, shape[0] * shape[1] // size * 18)
        return decode(np.asarray(raw).reshape(-1, 18)).reshape(shape)
    kind = gguf.GGMLQuantizationType[verdict.stored]
    (found,) = [t for t in gguf.GGUFReader(path).tensors if t.name == name]
    assert found.tensor_type == kind
    return dequantize(found.data, kind).reshape(shape)


def unpermuted(matrix: NDArray[np.float32], module: str, heads: int) -> NDArray[np.float32]:
    """llama.cpp's order of q and k rows undone: pairs (2i, 2i + 1) become halves (i, i + n/2)."""
    if not module.endswith(("q_proj", "k_proj")):
        return matrix
    rows = matrix.reshape(heads, matrix.shape[0] // heads // 2, 2, -1)
    return np.swapaxes(rows, 1, 2).reshape(matrix.shape)


def decoded(form: str, folder: Path, module: str, source: Checkpoint, verdict: Verdict) -> object:
    shape = source.modules[module][1]
    if form == "native":
        return spec_decode(folder, module)
    if form == "gguf":
        found = gguf_tensor(folder / "model.gguf", module, verdict, shape)
        assert isinstance(found, np.ndarray)
        return unpermuted(found, module, 4)
    return decoders.DECODERS[form](folder, module)


@pytest.mark.parametrize("inputs", [256, 192])
@pytest.mark.parametrize("form", sorted(FORMATS))
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_verdict_is_what_the_bytes_prove(
    tiny_model: Path, tmp_path: Path, grid: str, group: int | None, form: str, inputs: int
) -> None:
    if group is not None and inputs % group:
        pytest.skip(f"groups of {group} do not divide {inputs}")
    source = decoder_layer(tiny_model, grid, inputs, group)
    scheme, shape = source.modules[MODULES[0]]
    verdict = FORMATS[form].verdict(scheme, shape, Options())
    if verdict.kind(scheme) == "refused":
        assert verdict.reason
        with pytest.raises(RefusedError, match="Formats that hold it exactly: native"):
            pack(source, FORMATS[form], tmp_path / "out")
        assert not any(tmp_path.iterdir())
        return
    report = pack(source, FORMATS[form], tmp_path / "out")
    assert report.exact
    (said,) = report.verdicts
    assert said["verdict"] == verdict.kind(scheme)
    assert said["stored"] == verdict.stored
    for module in MODULES:
        expected = source.quantized(f"{module}.weight").dequantize().numpy()
        found = decoded(form, tmp_path / "out", module, source, verdict)
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert report.quantized_bytes * 8 == pytest.approx(
        verdict.bits_per_weight * 7 * inputs * inputs
    )
    assert report.quantized_bytes == stored_bytes(tmp_path / "out", form)


def stored_bytes(folder: Path, form: str) -> int:
    """Bytes of quantized matrices by the file's own header."""
    if form == "gguf":
        infos = GgufFile(folder / "model.gguf").tensors
        ordered = sorted(infos.items(), key=lambda item: item[1].offset)
        ends = [info.offset for _, info in ordered[1:]] + [(folder / "model.gguf").stat().st_size]
        return sum(
            end - info.offset
            for (_, info), end in zip(ordered, ends, strict=True)
            if info.type not in (0, 1, 30)
        )
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    spans = {n: h["data_offsets"] for n, h in header.items() if n != "__metadata__"}
    return sum(b - a for n, (a, b) in spans.items() if "_proj" in n)


@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"native"}))
@pytest.mark.parametrize("grid", GRIDS)
def test_round_trips_through_every_other_format(
    tiny_model: Path, tmp_path: Path, grid: str, form: str
) -> None:
    """Any format, then any that is exact for what that holds: codes and scales identical."""
    start = decoder_layer(tiny_model, grid, 256, None)
    scheme, shape = start.modules[MODULES[0]]
    if FORMATS[form].verdict(scheme, shape, Options()).kind(scheme) == "refused":
        pytest.skip(f"{form} refuses {grid}")
    pack(start, FORMATS[form], tmp_path / "first")
    first = open_checkpoint(tmp_path / "first")
    held = first.modules[MODULES[0]][0]
    tried = 0
    for name, other in FORMATS.items():
        if other.verdict(held, shape, Options()).kind(held) == "refused":
            continue
        pack(first, other, tmp_path / name)
        second = open_checkpoint(tmp_path / name)
        pack(second, FORMATS["native"], tmp_path / f"{name}-native")
        for module in first.modules:
            mine = first.quantized(f"{module}.weight")
            there = second.quantized(f"{module}.weight")
            assert torch.equal(mine.embed(there.scheme.grid).codes, there.codes)
            assert torch.equal(mine.embed(there.scheme.grid).scales, there.scales)
            last = open_checkpoint(tmp_path / f"{name}-native").quantized(f"{module}.weight")
            assert torch.equal(last.codes, there.codes)
            assert torch.equal(last.scales, there.scales)
            assert torch.equal(mine.dequantize(), last.dequantize())
        tried += 1
    assert tried >= 2


def test_a_bound_is_kept_and_needs_leave(tiny_model: Path, tmp_path: Path) -> None:
    """Q4_1 rounds minima: refused by default, bounded by half a unit where it is allowed."""
    source = decoder_layer(tiny_model, "uint4", 256, 32)
    with pytest.raises(RefusedError, match="Q4_1 has no block type that holds uint4 exactly"):
        pack(source, FORMATS["gguf"], tmp_path / "out", Options(block="Q4_1"))
    options = Options(block="Q4_1", allow_lossy=True)
    verdict = FORMATS["gguf"].verdict(Scheme(TABLE_GRIDS[-1], 32), (256, 256), options)
    assert verdict.kind(Scheme(TABLE_GRIDS[-1], 32)) == "bounded"
    report = pack(source, FORMATS["gguf"], tmp_path / "out", options)
    assert not report.exact
    assert 0 < report.verification.largest_ulp <= verdict.bound < 1
    held = gguf_tensor(tmp_path / "out" / "model.gguf", MODULES[0], verdict, (256, 256))
    expected = source.quantized(f"{MODULES[0]}.weight").dequantize().numpy()
    assert isinstance(held, np.ndarray)
    assert 0 < np.abs(held - expected).max() <= report.verification.largest_error


def test_each_is_recognised_by_its_files(tiny_model: Path, tmp_path: Path) -> None:
    for name, form in FORMATS.items():
        grid, group = taken_by(name)
        pack(decoder_layer(tiny_model, grid, 64, group), form, tmp_path / name)
        assert detect(tmp_path / name) is form
        assert open_checkpoint(tmp_path / name).layout == name
        assert [f.name for f in FORMATS.values() if f.detect(tmp_path / name)] == [name]
    lone = tmp_path / "renamed.bin"
    (tmp_path / "gguf" / "model.gguf").rename(lone)
    assert detect(lone) is FORMATS["gguf"]
    for other in (tiny_model, tmp_path, tmp_path / "nowhere", tiny_model / "config.json"):
        assert detect(other) is None
