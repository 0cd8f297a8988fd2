"""The native layout: a second decoder written from SPEC.md alone, golden bytes, damage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from qexport.errors import CheckpointError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.grid import GRIDS, Scheme
from qexport.source import open_source
from qexport.tensor import QuantizedTensor
from tests.conftest import WIDTHS, Runs
from tests.formats.models import checkpoint, tensor

NATIVE = FORMATS["native"]


def numpy_file(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a file that numpy has a dtype for."""
    return {n: t.numpy() for n, t in load_torch(path).items() if t.dtype != torch.bfloat16}


def spec_decode(folder: Path, module: str) -> NDArray[np.float32]:
    """A weight matrix by SPEC.md, bit by bit, in numpy."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["format"]) == ("qexport", "native")
    assert quantization["version"] == 1
    (group,) = [g for g in quantization["config_groups"] if module in g["modules"]]
    out, inputs = group["modules"][module]
    file = numpy_file(folder / "model.safetensors")
    qweight, scales = file[f"{module}.qweight"], file[f"{module}.scales"]
    values = np.empty((out, inputs), np.float32)
    size = group["group_size"] or inputs
    for o in range(out):
        stream = int.from_bytes(qweight[o].tobytes(), "little")
        for i in range(inputs):
            code = (stream >> (group["bits"] * i)) & ((1 << group["bits"]) - 1)
            assert code < group["levels"]
            scale = np.float32(scales[o, i // size])
            if "values" in group:
                values[o, i] = scale * np.float32(group["values"][code])
                continue
            if group.get("minima"):
                values[o, i] = np.float32(code) * scale - file[f"{module}.minima"][o, i // size]
                continue
            if group["zero_point"] is None:
                zero = np.float32(file[f"{module}.zeros"][o, i // size])
            else:
                zero = np.float32(group["zero_point"])
            values[o, i] = scale * (np.float32(code) - zero)
    return values


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_decodes_by_the_specification(
    runs: Runs, tmp_path: Path, bits: str, group_size: int | None
) -> None:
    source = open_checkpoint(runs(bits, group_size))
    report = pack(source, NATIVE, tmp_path / "out")
    assert report.exact
    assert report.verification.modules == 14
    for module in source.modules:
        expected = source.quantized(f"{module}.weight").dequantize().numpy()
        assert np.array_equal(spec_decode(tmp_path / "out", module), expected)


@pytest.mark.parametrize("shape", [(3, 7, None), (5, 33, 11), (1, 1, None), (2, 64, 16)])
@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_every_grid_and_odd_shape(
    tmp_path: Path, grid: str, shape: tuple[int, int, int | None]
) -> None:
    out, inputs, group = shape
    mine: dict[str, QuantizedTensor | torch.Tensor] = {
        "a.weight": tensor(grid, out, inputs, group),
        "norm": torch.randn(4).half(),
    }
    source = checkpoint(tmp_path, mine)
    pack(source, NATIVE, tmp_path / "out")
    expected = mine["a.weight"]
    assert isinstance(expected, QuantizedTensor)
    assert np.array_equal(spec_decode(tmp_path / "out", "a"), expected.dequantize().numpy())


def test_bits_per_weight_is_what_is_on_disk(tmp_path: Path) -> None:
    for grid in GRIDS:
        source = checkpoint(tmp_path, {"a.weight": tensor(grid, 16, 64, 32)})
        report = pack(source, NATIVE, tmp_path / grid)
        scheme = source.modules["a"][0]
        zeros = 8 - scheme.grid.bits if scheme.grid.zeros else 0  # whole bytes in this layout
        minima = 32 if scheme.grid.minima else 0
        assert report.bits_per_weight == scheme.bits_per_weight(64) + (zeros + minima) / 32


def test_golden_bytes(tmp_path: Path) -> None:
    """The bytes of one layer, so that the layout cannot drift with its reader."""
    codes = torch.tensor([[0, 1, 2, 3, 3, 2, 1, 0], [3, 3, 3, 3, 0, 0, 0, 1]], dtype=torch.uint8)
    scales = torch.tensor([[0.5], [0.25]], dtype=torch.float16)
    layer = QuantizedTensor(codes, scales, Scheme(GRIDS["seq2"]))
    pack(checkpoint(tmp_path, {"a.weight": layer}), NATIVE, tmp_path / "out")
    found = load_torch(tmp_path / "out" / "model.safetensors")
    assert set(found) == {"a.qweight", "a.scales"}
    assert found["a.qweight"].tolist() == [[0xE4, 0x1B], [0xFF, 0x40]]
    assert found["a.scales"].tolist() == [[0.5], [0.25]]


Damage = dict[str, Any]


@pytest.mark.parametrize(
    ("tensors", "groups", "message"),
    [
        ({"a.qweight": torch.zeros(2, 3).byte()}, {}, "a.qweight is uint8 .2, 3., and its scheme"),
        ({"a.qweight": torch.zeros(2, 2)}, {}, "a.qweight is float32"),
        ({"a.scales": torch.ones(2, 2).half()}, {}, "a.scales is float16 .2, 2., and its scheme"),
        ({"a.qweight": None}, {}, "no tensor a.qweight"),
        ({}, {"group_size": 3}, "group size 3 does not divide the 8 inputs of a"),
        ({}, {"modules": {"a": [2, -8]}}, "without modules"),
        ({}, {"modules": {"a": [2, 1 << 60]}}, "without modules"),
        ({}, {"modules": ["a"]}, "without modules"),
        ({}, {"grid": "seq3"}, "not one this version knows"),
    ],
)
def test_files_that_contradict_themselves(
    tmp_path: Path, tensors: Damage, groups: Damage, message: str
) -> None:
    pack(checkpoint(tmp_path, {"a.weight": tensor("seq2", 2, 8, None)}), NATIVE, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    held = {**load_torch(path), **tensors}
    save_file({name: t for name, t in held.items() if t is not None}, path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["config_groups"][0].update(groups)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "out")


def test_a_code_beyond_the_grid_is_damage(tmp_path: Path) -> None:
    pack(
        checkpoint(tmp_path, {"a.weight": tensor("ternary", 2, 8, None)}), NATIVE, tmp_path / "out"
    )
    path = tmp_path / "out" / "model.safetensors"
    save_file({**load_torch(path), "a.qweight": torch.full((2, 2), 255).byte()}, path)
    with pytest.raises(CheckpointError, match="code 3, and ternary has 3 levels"):
        open_checkpoint(tmp_path / "out").quantized("a.weight")


def test_another_version_is_refused(tmp_path: Path) -> None:
    pack(checkpoint(tmp_path, {"a.weight": tensor("seq2", 2, 8, None)}), NATIVE, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has version 2, and this qexport reads 1"):
        open_checkpoint(tmp_path / "out")


def test_an_unknown_quantizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "exl9"}}')
    assert open_source(tmp_path) is None
    with pytest.raises(CheckpointError, match="quantized as 'exl9'"):
        open_checkpoint(tmp_path)
