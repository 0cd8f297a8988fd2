"""The block-wise start: blocks are the model's own, get better, and outlive a kill."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qexport.blocks import Blocks
from qexport.checkpoint import Checkpoint
from qexport.errors import QexportError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.modelling import build_model
from qexport.tiny import write_tiny_model
from qexport.training import TrainConfig, train
from tests.forked_cli import Started, call
from tests.runtime.families import FAMILIES, make

LAYER = "model.layers.0.mlp.up_proj"
CPU = torch.device("cpu")


def config(model: Path, output: Path, **changes: object) -> TrainConfig:
    settings: dict[str, object] = {
        **{"data": "builtin", "bits": "2", "group_size": 32, "max_steps": 2, "max_length": 32},
        **{"batch_size": 8, "block_epochs": 1, "block_lr": 1e-3, "precision": "fp32"},
        "block_windows": 64,
    }
    return TrainConfig(model=model, output=output, **{**settings, **changes})  # type: ignore[arg-type]


def test_tokens_without_activations_do_no_harm(tiny_model: Path, tmp_path: Path) -> None:
    """An embedding of zeros at the start of a window: its block's output is nothing at all."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "<|end|>" * 40}) + "\n" for _ in range(60)))
    run = tmp_path / "run"
    train(
        config(tiny_model, run, data=str(text), phase="block", max_length=16), Console(quiet=True)
    )
    source = open_checkpoint(run)
    for name in source.modules:
        assert bool(source.quantized(f"{name}.weight").scales.isfinite().all())


def test_a_block_that_diverges_is_not_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = "qexport.training.block.relative_errors"
    monkeypatch.setattr(nothing, lambda made, _: made.sum() * math.nan)
    with pytest.raises(QexportError, match="block 1 has diverged; lower --block-lr"):
        train(config(tiny_model, tmp_path / "run"), Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_gptq_alone(tiny_model: Path, tmp_path: Path) -> None:
    """Without a pass of training: other codes than rounding's, and a RUN that packs."""
    runs = {}
    for name, changes in (
        ("rounded", {"phase": "end", "block_epochs": 0}),
        ("gptq", {"phase": "block", "block_epochs": 0, "block_compensated": 10**6}),
    ):
        run = tmp_path / name
        train(config(tiny_model, run, max_steps=0, **changes), Console(quiet=True))
        runs[name] = open_checkpoint(run).quantized(f"{LAYER}.weight")
    share = (runs["rounded"].codes != runs["gptq"].codes).float().mean()
    assert 0.01 < float(share) < 0.5


def test_scales_of_gptq_begin_as_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    found = []
    for rule in ("paper", "mse"):
        changes = {"phase": "block", "block_epochs": 0, "block_compensated": 8, "scale_init": rule}
        train(config(tiny_model, tmp_path / rule, max_steps=0, **changes), Console(quiet=True))
        found.append(open_checkpoint(tmp_path / rule).quantized(f"{LAYER}.weight").scales)
    assert not torch.equal(*found)


@pytest.mark.slow
def test_alone_it_holds_one_block(tmp_path: Path) -> None:
    """Peak memory of a model of twenty more blocks: theirs would be 330 MB in float32."""
    text = tmp_path / "text.txt"
    text.write_text("a few words " * 400)
    peaks = []
    for layers in (4, 24):
        folder = tmp_path / f"model-{layers}"
        model = write_tiny_model(
            folder, hidden_size=512, intermediate_size=2048, head_dim=64, num_hidden_layers=layers
        )
        command = [
            *(sys.executable, "-m", "tests.train.anonymous_peak", "train", str(model)),
            *("--data", str(text), "--bits", "4", "--group-size", "64", "--phase", "block"),
            *("--block-epochs", "1", "--block-windows", "4", "--max-length", "32"),
            *("--scale-init", "paper", "-o", str(tmp_path / f"run-{layers}")),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 60, peaks


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_are_the_model(tmp_path: Path, family: str) -> None:
    """Masks, windows, rotary embeddings: what comes out of the last one is the model's own."""
    source: Checkpoint = make(tmp_path, family)
    model = build_model(source, torch.float32, source.dense)
    tokens = torch.randint(0, 250, (2, 40))
    seen: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=tokens)
        blocks = Blocks(source, torch.float32, CPU)
        hidden = blocks.embed(tokens)
        for index in range(len(blocks)):
            hidden = blocks.run(index, blocks.make(index), hidden)
            blocks.release(index)
    assert torch.allclose(hidden, seen[0], atol=1e-4)


def test_errors_fall_and_the_run_is_a_run(tiny_model: Path, tmp_path: Path) -> None:
    """Alone, it writes a RUN that packs exactly."""
    lines: list[str] = []
    console = Console(quiet=True)
    console.print = lambda *parts, **_: lines.append(" ".join(map(str, parts)))  # type: ignore[method-assign]
    run = tmp_path / "run"
    results = train(config(tiny_model, run, phase="block", block_epochs=3), console)
    errors = [line.split()[-3:] for line in lines if line.startswith("block ")]
    assert len(errors) == 2
    assert all(float(after[:-1]) < float(before[:-1]) for before, _, after in errors)
    assert results["steps"] == 0 and not (run / ".blocks").exists()
    assert pack(open_checkpoint(run), FORMATS["native"], tmp_path / "packed").exact


def test_it_is_where_training_begins(tiny_model: Path, tmp_path: Path) -> None:
    """Two steps at no rate leave it as it was."""
    alone = config(tiny_model, tmp_path / "alone", phase="block")
    both = config(tiny_model, tmp_path / "both", lr=1e-30, scale_lr=1e-30)
    for one in (alone, both):
        train(one, Console(quiet=True))
    first, second = (open_checkpoint(one.output) for one in (alone, both))
    for name in first.modules:
        assert torch.equal(*(one.quantized(f"{name}.weight").codes for one in (first, second)))


def test_a_kill_costs_one_block_at_most(tmp_path: Path) -> None:
    """Blocks that were done are not done again, and what comes out is the same."""
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=6)
    run = tmp_path / "run"
    options = {
        **{"--data": "builtin", "--bits": "2", "--group-size": "32", "--phase": "block"},
        **{"--block-epochs": "2", "--max-length": "64", "--precision": "fp32"},
        **{"--block-windows": "64", "-o": str(run)},
    }
    flat = [part for pair in options.items() for part in pair]
    command = ["train", str(model), "--no-compile", *flat]
    process = Started(command)
    progress = run / ".blocks" / "blocks.json"
    while process.poll() is None and not (
        progress.exists() and json.loads(progress.read_text())["done"] >= 2
    ):
        time.sleep(0.005)
    process.kill()
    process.said()
    assert process.returncode == -signal.SIGKILL, "it was too fast to be killed"
    done = json.loads(progress.read_text())["done"]
    again = call(command)
    assert again.returncode == 0
    assert f"block {done + 1}/6" in again.stderr and f"block {done}/6" not in again.stderr
    whole = tmp_path / "whole"
    command[-1] = str(whole)
    assert call(command).returncode == 0
    first, second = open_checkpoint(run), open_checkpoint(whole)
    for name in first.modules:
        mine, theirs = (one.quantized(f"{name}.weight") for one in (first, second))
        assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.scales, theirs.scales)
