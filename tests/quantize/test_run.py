"""`quantize` from a dense model to a RUN that packs exactly, and what goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain, product
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from qexport.errors import CheckpointError, DataError, InputError, QexportError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.base import Options
from qexport.formats.pack import pack
from qexport.output import mark
from qexport.quantization import GptqOptions, QuantizeConfig, quantize_model
from qexport.quantization.calibration import _batches
from qexport.quantization.config import METHODS
from qexport.quantization.signround import SignRoundOptions
from qexport.tiny import write_tiny_model
from tests.conftest import Cli
from tests.runtime.families import FAMILIES, make

QUIET = Console(quiet=True)


def config(model: Path, output: Path, **changes: object) -> QuantizeConfig:
    settings: dict[str, object] = {
        **{"method": "gptq", "bits": "4", "group_size": 32, "calibration": "builtin"},
        **{"samples": 24, "length": 32, "precision": "fp32"},
        "signround": SignRoundOptions(iterations=4),
    }
    return QuantizeConfig(model=model, output=output, **{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "bits", "sym"),
    [
        ("w8a8", "8", True),
        ("nf4", "4", True),
        ("kquant", "4", True),
        *product(("rtn", "gptq", "awq", "signround"), ("2", "3", "4", "8"), (True, False)),
    ],
)
def test_every_method_packs_exactly(
    method: str, bits: str, sym: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """To every format that holds its grid; what is not quantized is the model's own."""
    run = tmp_path / "run"
    group = 32 if sym and method not in ("w8a8", "kquant") else None
    results = quantize_model(
        config(tiny_model, run, method=method, bits=bits, sym=sym, group_size=group), QUIET
    )
    source, dense = open_checkpoint(run), open_checkpoint(tiny_model)
    assert len(results["layers"]) == len(source.modules) == 14
    assert all(scheme.grid.zeros != sym for scheme, _ in source.modules.values())
    folds = METHODS[method].scaling != "none"
    changed = {name for name in source if "layernorm" in name and folds}
    for name in set(source) - {f"{module}.weight" for module in source.modules} - changed:
        assert torch.equal(source.dense(name), dense.dense(name))
    formats = []
    for name, form in FORMATS.items():
        if all(form.verdict(*entry, Options()).exact for entry in source.modules.values()):
            assert pack(source, form, tmp_path / name).exact
            formats.append(name)
    assert "native" in formats
    assert method != "w8a8" or "int-quantized" in formats


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family(family: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", family).folder
    for method in ("gptq", "awq"):
        asked = config(model, tmp_path / method, method=method, group_size=16)
        results = quantize_model(asked, QUIET)
        assert pack(open_checkpoint(tmp_path / method), FORMATS["native"], tmp_path / "out").exact
        if method == "gptq":
            for layer in results["layers"].values():
                assert layer["error"] < layer["rtn_error"]


def test_widths_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    asked = config(
        tiny_model,
        tmp_path / "run",
        module_bits=("*.down_proj=8:-1", "*.0.*.q_proj=16"),
        exclude=("*.v_proj",),
        method="awq",
    )
    quantize_model(asked, QUIET)
    modules = open_checkpoint(tmp_path / "run").modules
    found = {name.removeprefix("model.layers."): scheme for name, (scheme, _) in modules.items()}
    assert found["1.mlp.down_proj"].label == "int8 per channel"
    assert found["1.self_attn.q_proj"].label == "int4 g32"
    assert "0.self_attn.q_proj" not in found
    assert not [name for name in found if "v_proj" in name]


def test_all_that_is_seen_at_once(tiny_model: Path, tmp_path: Path) -> None:
    """Without `true_sequential`: one pass a block, other codes."""
    made = []
    for sequential in (True, False):
        run = tmp_path / str(sequential)
        quantize_model(config(tiny_model, run, bits="2", true_sequential=sequential), QUIET)
        made.append(open_checkpoint(run).quantized("model.layers.0.mlp.down_proj.weight").codes)
    assert not torch.equal(*made)


@pytest.mark.parametrize("method", ["gptq", "signround"])
def test_a_killed_run_goes_on_with_its_block(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To identical codes, without doing again what is done; another recipe is refused."""
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=6)
    whole, cut = (config(model, tmp_path / name, method=method) for name in ("whole", "cut"))
    quantize_model(whole, QUIET)
    script = (
        "import sys; from tests.quantize.test_run import *; "
        f"quantize_model(config(Path({str(model)!r}), Path({str(cut.output)!r}), "
        f"method={method!r}), QUIET)"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    done = cut.output / ".blocks" / "blocks.json"
    deadline = time.monotonic() + 120
    while not done.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(json.loads(done.read_text())["blocks"])
    assert 1 <= finished < 6
    another = config(model, cut.output, method=method, gptq=GptqOptions(percdamp=0.05))
    with pytest.raises(InputError, match="holds another run"):
        quantize_model(another, QUIET)
    with pytest.raises(InputError, match="48"):  # what fits no folder is told first
        quantize_model(replace(another, group_size=48), QUIET)
    made: list[int] = []
    original = quantize_model.__globals__["quantize_block"]

    def counted(*arguments: object) -> object:
        made.append(1)
        return original(*arguments)

    monkeypatch.setitem(quantize_model.__globals__, "quantize_block", counted)
    quantize_model(cut, QUIET)
    assert len(made) == 6 - finished
    first, second = open_checkpoint(whole.output), open_checkpoint(cut.output)
    for module in first.modules:
        one, other = (found.quantized(f"{module}.weight") for found in (first, second))
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)
    quantize_model(cut, QUIET)
    assert len(made) == 6 - finished  # it is finished


def changed(model: Path, target: Path, name: str, change: object) -> Path:
    """A copy of a model with one of its tensors changed."""
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_damage_names_the_layer(tiny_model: Path, tmp_path: Path) -> None:
    def broken(tensor: torch.Tensor) -> torch.Tensor:
        tensor[:, 0] = float("nan")
        return tensor

    layer = "model.layers.1.mlp.up_proj"
    weights = changed(tiny_model, tmp_path / "weights", f"{layer}.weight", broken)
    with pytest.raises(QexportError, match=rf"{layer} holds a NaN"):
        quantize_model(config(weights, tmp_path / "run", method="rtn"), QUIET)
    inputs = changed(tiny_model, tmp_path / "inputs", "model.embed_tokens.weight", broken)
    with pytest.raises(QexportError, match=r"layers.0.self_attn.q_proj are not finite"):
        quantize_model(config(inputs, tmp_path / "other"), QUIET)
    assert not (tmp_path / "other").exists()


def test_signround_of_some_blocks(tiny_model: Path, tmp_path: Path) -> None:
    """Where nothing is quantized nothing is learned."""
    asked = config(tiny_model, tmp_path / "run", method="signround", include=("*.layers.0.*",))
    assert len(quantize_model(asked, QUIET)["layers"]) == 7


def test_activations_that_are_gone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed does not go on with zeros."""
    asked = config(tiny_model, tmp_path / "run")
    original = quantize_model.__globals__["quantize_block"]
    calls = []

    def once(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setitem(quantize_model.__globals__, "quantize_block", once)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(asked, QUIET)
    (stream,) = asked.output.glob(".blocks/quantized-1-0.bin")
    stream.unlink()
    with pytest.raises(QexportError, match="gone or cut short; give --no-resume"):
        quantize_model(asked, QUIET)


def test_inputs_that_are_never_active(tiny_model: Path, tmp_path: Path) -> None:
    """A dead column's weights are rounded to nearest; nothing else is disturbed."""

    def dead(norm: torch.Tensor) -> torch.Tensor:
        norm[:5] = 0
        return norm

    model = changed(tiny_model, tmp_path / "model", "model.layers.0.input_layernorm.weight", dead)
    for method in METHODS:
        own: dict[str, dict[str, object]] = {
            "w8a8": {"bits": "8", "group_size": None},
            "kquant": {"group_size": None},
        }
        scheme = own.get(method, {})
        asked = config(model, tmp_path / method, method=method, **scheme)
        results = quantize_model(asked, QUIET)
        assert all(layer["error"] < 0.1 for layer in results["layers"].values())


def test_too_little_text(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words " * 4)
    with pytest.raises(DataError, match="fewer than one window of 64"):
        quantize_model(
            config(tiny_model, tmp_path / "run", calibration=str(text), length=64), QUIET
        )
    console = Console()
    quantize_model(config(tiny_model, tmp_path / "run", calibration=str(text)), console)
    told = " ".join(capsys.readouterr().out.split())
    assert "has 1 windows of 32 tokens, fewer than the 24 asked for" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "there is no --method magic; there are rtn, gptq"),
        ({"bits": "7"}, "--bits 7 is not a width"),
        ({"bits": "1", "sym": False}, "no such grid of 1 bits"),
        ({"method": "w8a8"}, "w8a8 is of --bits 8 and --group-size -1"),
        ({"smooth": 1.5}, "--smooth 1.5 is not a share"),
        ({"per_tensor": True}, "--per-tensor goes neither"),
        (
            {"per_tensor": True, "group_size": None, "module_bits": ("*.o_proj=4:32",)},
            "give no group to --module-bits",
        ),
        ({"grid": "int17"}, "there is no --grid int17"),
        ({"group_size": 0}, "is not a group"),
        ({"group_size": 48}, "--group-size 48 does not divide the 64 inputs"),
        ({"calibration": None}, "wants --calibration"),
        ({"calibration": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"samples": 0}, "--samples is less than 1"),
        ({"length": 4096}, "--length 4096 is beyond the context of 512"),
        ({"exclude": ("*",)}, "no layer is left"),
        ({"include": ("nothing",)}, "no name of a layer that may be quantized fits nothing"),
        ({"include": ("*.mlp",)}, "fits .*mlp; they are like"),
        ({"exclude": ("model.norm",)}, "fits model.norm; they are like"),
        ({"grid": "int8"}, "--grid int8 is of 8 bits, and --bits says 4"),
        ({"grid": "uint4"}, "--grid uint4 goes with --asym"),
        ({"bits": "2", "grid": "seq2", "sym": False}, "--grid seq2 goes with --sym"),
        ({"calibration": "."}, "is a folder without data; give a .jsonl"),
        ({"target_bpw": 2.0}, "the narrowest widths come to 2.500"),
        ({"gptq": GptqOptions(percdamp=0)}, "--percdamp 0 is not between 0 and 1"),
    ],
)
def test_mistakes(
    changes: dict[str, object], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        quantize_model(config(tiny_model, tmp_path / "run", **changes), QUIET)
    assert not (tmp_path / "run").exists()


def test_a_group_as_wide_as_the_layer_packs_exactly(tiny_model: Path, tmp_path: Path) -> None:
    """It is said as it was asked for, and not as one scale per channel."""
    include = ("*.q_proj",)  # of 64 inputs
    asked = config(
        tiny_model, tmp_path / "run", method="rtn", bits="4", group_size=64, include=include
    )
    quantize_model(asked, QUIET)
    for form in ("native", "gptq", "gptq_v2", "awq", "compressed-tensors", "humming", "gguf"):
        assert pack(open_checkpoint(tmp_path / "run"), FORMATS[form], tmp_path / form).exact, form


def test_tensors_of_another_shape_are_told(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:, :32].contiguous()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight is \[128, 32\], and its config wants"
    ):
        quantize_model(config(model, tmp_path / "run"), QUIET)


def test_weights_too_large_for_scales_are_told(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3] = 3e38
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        QexportError, match=r"layers.0.mlp.up_proj holds weights that are too large"
    ):
        quantize_model(config(model, tmp_path / "run", method="rtn"), QUIET)


def test_layers_of_zeros_lose_nothing(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"].zero_()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    results = quantize_model(config(model, tmp_path / "run", method="rtn"), QUIET)
    assert results["layers"]["model.layers.0.self_attn.q_proj"]["error"] == 0


def test_a_book_is_tokenized_in_pieces() -> None:
    """And documents in batches of no more characters than that, none lost."""
    book = "x" * (5 << 19)
    texts = ["short", book, *["a" * (1 << 18)] * 9, *["b"] * 200]
    batches = list(_batches(texts))
    assert "".join(chain(*batches)) == "".join(texts)
    assert max(sum(map(len, batch)) for batch in batches) <= 1 << 20
    assert max(map(len, batches)) == 64


def test_an_unfinished_run_is_called_so(tmp_path: Path) -> None:
    mark(tmp_path, "run", status="begun")
    with pytest.raises(CheckpointError, match="a run that is not finished"):
        open_checkpoint(tmp_path)
    mark(tmp_path, "run", status="finished")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)


def test_a_damaged_run_is_told(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quantize_model(config(tiny_model, run, bits="3"), QUIET)
    tensors = load_file(run / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 9
    save_file(tensors, run / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds code 9, and int3 has 8 levels"):
        open_checkpoint(run).quantized("model.layers.0.mlp.up_proj.weight")


def test_the_command(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """From quantize to pack, verify and eval; what a dry run leaves."""
    arguments = ("quantize", tiny_model, "--method", "gptq", "--bits", 4, "--group-size", 32)
    text = ("--calibration", "builtin", "--samples", 8, "--length", 32)
    dry = cli(*arguments, *text, "-o", "run", "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0
    assert "14 layers to int4 g32, by 256 tokens" in dry.stderr
    assert not (tmp_path / "run").exists()
    done = cli(*arguments, *text, "-o", "run", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["bits_per_weight"] == 4.5
    for command in (
        ("pack", "run", "--format", "gptq", "-o", "packed"),
        ("verify", "run", "packed"),
        ("eval", "run", "--window", 64, "--max-tokens", 256),
        ("inspect", "run"),
    ):
        assert cli(*command, cwd=tmp_path).returncode == 0
    again = cli("train", "run", "--data", "builtin", "--bits", 4, "-o", "other", cwd=tmp_path)
    assert again.returncode == 2
    assert "start from a dense checkpoint" in again.stderr


@pytest.mark.parametrize("method", ["rtn", "gptq", "signround"])
@pytest.mark.parametrize("block", ["Q2_K", "Q3_K"])
def test_blocks_of_gguf_that_hold_it(block: str, method: str, tmp_path: Path) -> None:
    """Scales are tied as a super-block ties them, so that the file is exact."""
    model = write_tiny_model(tmp_path / "model", hidden_size=256, intermediate_size=256)
    bits = {"Q2_K": "2", "Q3_K": "3"}[block]
    run, target = tmp_path / "run", f"gguf:{block}"
    asked = config(model, run, method=method, bits=bits, target=target, group_size=None)
    quantize_model(asked, QUIET)
    source = open_checkpoint(run)
    report = pack(source, FORMATS["gguf"], tmp_path / "out", Options(block=block))
    assert report.exact
    assert f" in {block}, exact" in report.held[0]
    with pytest.raises(InputError, match=f"--target {target} is symmetric, of {bits} bits"):
        config(model, run, method=method, bits="4", target=target, group_size=None)
