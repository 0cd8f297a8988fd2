"""NF4 in bitsandbytes' layout: bitsandbytes itself says what is in it."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Params4bit
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qexport.errors import CheckpointError, UnsupportedError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.base import Options
from qexport.formats.pack import pack
from qexport.formats.verify import verify
from qexport.grid import INT4, NF4, Scheme
from qexport.quantization import quantize_model
from qexport.runtime.loader import open_model
from qexport.runtime.vllm_server import preflight
from tests.quantize.test_run import config

QUIET = Console(quiet=True)
NAME = "model.layers.0.mlp.up_proj"
FORM = FORMATS["bitsandbytes"]


@pytest.fixture(scope="module", params=[True, False], ids=["double", "float32"])
def packed(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A RUN, and what is packed of it."""
    return made(tiny_model, tmp_path_factory.mktemp("nf4"), double=request.param)


@pytest.fixture(scope="module")
def doubled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same with scales of 8 bits."""
    return made(tiny_model, tmp_path_factory.mktemp("doubled"), double=True)


def made(model: Path, folder: Path, *, double: bool) -> tuple[Path, Path]:
    run, out = folder / "run", folder / "out"
    asked = {"method": "nf4", "group_size": 64, "double_quant": double}
    quantize_model(config(model, run, **asked), QUIET)
    assert pack(open_checkpoint(run), FORM, out).exact
    return run, out


def test_bitsandbytes_reads_the_same_values(packed: tuple[Path, Path]) -> None:
    """Every weight, to the bit, rounded to the dtype that its state names."""
    run, out = packed
    source, file = open_checkpoint(run), load_file(out / "model.safetensors")
    for module in source.modules:
        weight = f"{module}.weight"
        stats = {n.removeprefix(f"{weight}."): t for n, t in file.items() if n.startswith(weight)}
        data = stats.pop(weight)
        theirs = Params4bit.from_prequantized(data, dict(stats), device="cpu")
        values = bnb.dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(values, source.quantized(weight).dequantize(torch.bfloat16)), module
        nested = {name for name in stats if "nested" in name}
        assert bool(nested) == source.modules[module][0].double_quant


def test_it_is_read_again(packed: tuple[Path, Path], tmp_path: Path) -> None:
    run, out = packed
    source, again = open_checkpoint(run), open_checkpoint(out)
    assert again.layout == "bitsandbytes" and again.modules == source.modules
    assert verify(source, again).exact
    native = pack(source, FORMATS["native"], tmp_path / "native")
    assert native.exact and verify(source, open_checkpoint(tmp_path / "native")).exact
    config_ = json.loads((out / "config.json").read_text())["quantization_config"]
    double = source.modules[NAME][0].double_quant
    assert config_["bnb_4bit_use_double_quant"] is double
    stored = sum(
        open_checkpoint(tmp_path / "native").entries[f"{m}.weight"].stored_bytes
        for m in source.modules
    )
    weights = sum(out * inputs for _, (out, inputs) in source.modules.values())
    assert stored * 8 / weights < (4.2 if double else 4.51)


def test_vllm_is_not_promised(packed: tuple[Path, Path], tmp_path: Path) -> None:
    run, out = packed
    assert "vLLM does not read it" in (out / "README.md").read_text()
    pack(open_checkpoint(run), FORMATS["native"], tmp_path / "native")
    assert "vLLM does not read it" in (tmp_path / "native" / "README.md").read_text()
    for folder in (out, tmp_path / "native"):
        with pytest.raises(UnsupportedError, match=r"vLLM does not|no kernel under vLLM"):
            preflight(folder, "auto")


def test_transformers_answers_alike(packed: tuple[Path, Path]) -> None:
    _, out = packed
    ours, _, _ = open_model(out, "bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    tokens = torch.arange(1, 25).view(1, -1)
    with torch.no_grad():
        mine, found = ours(tokens).logits.float(), theirs(tokens).logits.float()
    assert type(theirs.get_submodule(NAME)).__name__ == "Linear4bit"
    assert float((mine - found).abs().max()) < 0.02 * float(mine.abs().max())


@pytest.mark.parametrize("double", [True, False])
def test_what_bitsandbytes_wrote(double: bool, tiny_model: Path, tmp_path: Path) -> None:
    """Its own rounding, saved by its own code, with its map and its offset."""
    tensors = load_file(tiny_model / "model.safetensors")
    settings = json.loads((tiny_model / "config.json").read_text())
    expected = {}
    for name in list(tensors):
        if "_proj.weight" in name:
            weight = tensors[name].float()
            data, state = bnb.quantize_4bit(
                weight.to(torch.bfloat16),
                blocksize=64,
                compress_statistics=double,
                quant_type="nf4",
            )
            expected[name] = bnb.dequantize_4bit(data, state)
            tensors[name] = data
            parts = state.as_dict(packed=True)
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in parts.items()}
    settings["quantization_config"] = {
        **{"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bnb_4bit_use_double_quant": double,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    assert len(found.modules) == len(expected)
    for name, wanted in expected.items():
        tensor = found.quantized(name)
        assert tensor.scheme == Scheme(NF4, 64, torch.float32)
        assert torch.equal(tensor.dequantize(torch.bfloat16), wanted)


def test_what_it_refuses() -> None:
    for scheme, said in (
        (Scheme(NF4, 32, torch.float32), "powers of two, and this is g32"),
        (Scheme(NF4, None, torch.float32), "powers of two, not one scale per channel"),
        (Scheme(INT4, 64, torch.float32), "has no grid that holds int4"),
    ):
        reason = FORM.verdict(scheme, (64, 192), Options()).reason
        assert reason is not None and said in reason
    for name, form in FORMATS.items():
        exact = form.verdict(Scheme(NF4, 64, torch.float32), (64, 192), Options()).exact
        assert exact == (name in ("native", "bitsandbytes")), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": [64, "x"]}, "the state"),
        ({"quant_type": "fp4"}, "the state"),
        ({"blocksize": 48}, "run over the ends"),
        ({"nested_offset": "nan"}, "its nested_offset"),
        ({"nested_blocksize": 0}, "its nested_blocksize"),
        ({"nested_blocksize": 2**70}, "its nested_blocksize"),
    ],
)
def test_damage(
    change: dict[str, Any], said: str, doubled: tuple[Path, Path], tmp_path: Path
) -> None:
    _, out = doubled
    tensors = load_file(out / "model.safetensors")
    key = f"{NAME}.weight.quant_state.bitsandbytes__nf4"
    state = {**json.loads(bytes(tensors[key].tolist())), **change}
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((out / "config.json").read_text())
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path).quantized(f"{NAME}.weight")


def test_scales_that_are_not_doubled(doubled: tuple[Path, Path], tmp_path: Path) -> None:
    """A native file in which no code of a block is 255; a block size beyond all scales."""
    run, out = doubled
    pack(open_checkpoint(run), FORMATS["native"], tmp_path / "native")
    path = tmp_path / "native" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{NAME}.scales"].clamp_(max=254)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="not those of a double quantization"):
        open_checkpoint(tmp_path / "native").quantized(f"{NAME}.weight")
    tensors = load_file(out / "model.safetensors")
    key = f"{NAME}.weight.quant_state.bitsandbytes__nf4"
    state = {**json.loads(bytes(tensors[key].tolist())), "nested_blocksize": 2**30}
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"{NAME}.weight.nested_absmax"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((out / "config.json").read_text())
    assert open_checkpoint(tmp_path).quantized(f"{NAME}.weight").scales.shape[1] == 1


def test_another_map_is_damage(packed: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = packed
    tensors = load_file(out / "model.safetensors")
    tensors[f"{NAME}.weight.quant_map"][3] += 0.01
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((out / "config.json").read_text())
    with pytest.raises(CheckpointError, match="a quant_map that is not NF4"):
        open_checkpoint(tmp_path).quantized(f"{NAME}.weight")
