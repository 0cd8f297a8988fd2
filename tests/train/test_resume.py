"""A run that is killed goes on as if it had never stopped: same losses, same codes, to the bit."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerState

from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.formats.verify import verify
from qexport.tiny import write_tiny_model
from qexport.training import TrainConfig, state, train
from tests.conftest import Cli
from tests.forked_cli import Started, call

STEPS = 24


def command(model: Path, output: Path, *extra: str) -> list[str]:
    settings = {
        "--data": "builtin",
        "--bits": "2",
        "--group-size": "32",
        "--max-steps": str(STEPS),
        "--max-length": "64",
        "--batch-size": "2",
        "--gradient-accumulation": "2",
        "--lr": "1e-3",
        "--save-steps": "3",
        "--log-steps": "2",
        "--precision": "fp32",
    }
    flat = [part for pair in settings.items() for part in pair]
    return ["train", str(model), *flat, "-o", str(output), *extra]


def kill_after_a_checkpoint(arguments: list[str], output: Path, seed: int) -> bool:
    """Start, wait for a first checkpoint and a random moment more, and kill -9. False: too late."""
    process = Started(arguments)
    had = set(output.glob("checkpoint-*"))
    while process.poll() is None and not set(output.glob("checkpoint-*")) - had:
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 0.2))
    process.kill()
    process.said()
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    result = call(command(tiny_model, output))
    assert result.returncode == 0, result.stderr
    return output


def test_dropout_draws_the_same_numbers_after_a_resume(tmp_path: Path) -> None:
    """Stopped in-process after a checkpoint, so that the random generators matter."""
    model = write_tiny_model(tmp_path / "model", attention_dropout=0.2)

    def settings(output: Path) -> TrainConfig:
        return TrainConfig(
            model, "builtin", output, "2", 32, max_steps=6, max_length=32, lr=1e-3, save_steps=2
        )

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings(whole), Console(quiet=True))
    with pytest.MonkeyPatch.context() as patch:
        save = state.save

        def save_and_stop(*arguments: Any) -> None:
            save(*arguments)
            raise KeyboardInterrupt

        patch.setattr(state, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings(parts), Console(quiet=True))
    assert [path.name for path in parts.glob("checkpoint-*")] == ["checkpoint-2"]
    torch.rand(100)  # another state of the generator than the interrupted process had
    train(settings(parts), Console(quiet=True))
    report = verify(open_checkpoint(whole), open_checkpoint(parts))
    assert report.exact, report.describe()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_and_resumed_is_bit_equal(
    tiny_model: Path, uninterrupted: Path, tmp_path: Path, seed: int
) -> None:
    output = tmp_path / "run"
    arguments = command(tiny_model, output)
    assert kill_after_a_checkpoint(arguments, output, seed)
    kill_after_a_checkpoint(arguments, output, seed + 100)
    result = call(arguments)
    assert result.returncode == 0, result.stderr
    assert "resuming from checkpoint-" in result.stderr

    mine, theirs = (
        json.loads((d / "all_results.json").read_text()) for d in (output, uninterrupted)
    )
    for key in ("steps", "tokens", "train_loss", "final_loss", "eval_loss", "eval_perplexity"):
        assert mine[key] == theirs[key], key
    losses = [
        [
            row["loss"]
            for row in json.loads((d / "trainer_state.json").read_text())["log_history"][:-2]
        ]
        for d in (output, uninterrupted)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS // 2
    report = verify(open_checkpoint(uninterrupted), open_checkpoint(output))
    assert report.exact, report.describe()
    pack(open_checkpoint(output), FORMATS["native"], tmp_path / "packed")
    packed = verify(open_checkpoint(uninterrupted), open_checkpoint(tmp_path / "packed"))
    assert packed.exact, packed.describe()


def test_a_finished_run_is_not_trained_again(tiny_model: Path, uninterrupted: Path) -> None:
    before = (uninterrupted / "model.safetensors").stat().st_mtime_ns
    result = call(command(tiny_model, uninterrupted))
    assert result.returncode == 0
    assert "is finished already" in result.stderr
    assert (uninterrupted / "model.safetensors").stat().st_mtime_ns == before


def test_another_runs_folder_is_left_alone(tiny_model: Path, uninterrupted: Path) -> None:
    result = call(command(tiny_model, uninterrupted, "--seed", "7"))
    assert result.returncode == 2
    assert "holds another run (seed 0, now 7)" in result.stderr
    # what fits no folder is told before what does not fit this one
    result = call(command(tiny_model, uninterrupted, "--seed", "7", "--exclude", "nothing.like.it"))
    assert result.returncode == 2
    assert "nothing.like.it" in result.stderr


def test_no_resume_starts_over(tiny_model: Path, tmp_path: Path, cli: Cli) -> None:
    output = tmp_path / "run"
    common = ("train", tiny_model, "--data", "builtin", "--max-steps", 1, "--max-length", 32)
    assert cli(*common, "--bits", "2", "-o", output).returncode == 0
    assert cli(*common, "--bits", "3", "-o", output).returncode == 2
    assert cli(*common, "--bits", "3", "-o", output, "--no-resume").returncode == 0
    scheme, _ = open_checkpoint(output).modules["model.layers.0.mlp.up_proj"]
    assert scheme.grid.name == "int3"


def test_a_checkpoint_cut_short_is_never_taken_for_one(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer_state = TrainerState(global_step=5)
    state.save(tmp_path, trainer_state, model, optimizer.state, scheduler, {"x": 1})
    (tmp_path / ".checkpoint-9").mkdir()
    (tmp_path / ".checkpoint-9" / "masters.safetensors").write_bytes(b"half")
    assert state.last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    state.drop_checkpoints(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert not list(tmp_path.rglob("*.p*t*h")) + list(tmp_path.rglob("*.bin"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tiny_model: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """What a disk has lost of the newest one costs the steps since the one before, and no more."""
    output = tmp_path / "run"
    arguments = command(tiny_model, output)
    while len(found := sorted(output.glob("checkpoint-*"))) < 2:
        assert kill_after_a_checkpoint(arguments, output, 0)
    newest = max(found, key=state.step_of)
    weights = newest / "masters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    result = call(arguments)
    assert result.returncode == 0, result.stderr
    assert f"{newest.name} is damaged, and removed" in " ".join(result.stderr.split())
    assert verify(open_checkpoint(uninterrupted), open_checkpoint(output)).exact


def test_a_kill_while_the_files_get_their_names(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command finishes the run, and another one may clear it away."""
    config = TrainConfig(
        tiny_model, "builtin", tmp_path / "run", "2", 32, max_steps=2, max_length=32
    )
    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.name == "config.json":
            os._exit(9)
        return replace(path, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "replace", killed)
        train(config, Console(quiet=True))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (config.output / "model.safetensors").exists()
    assert not (config.output / "config.json").exists()
    train(config, Console(quiet=True))
    assert open_checkpoint(config.output).modules
    assert not list(config.output.glob(".[!.]*")) + list(config.output.glob("checkpoint-*"))


def test_what_may_change_at_a_resume_does(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = command(tiny_model, output)
    assert kill_after_a_checkpoint(arguments, output, 0)
    first = max(map(state.step_of, output.glob("checkpoint-*")))
    process = Started([*arguments, "--save-steps", "1"])
    seen: set[int] = set()
    while process.poll() is None:
        seen |= set(map(state.step_of, output.glob("checkpoint-*")))
    assert process.returncode == 0, process.said()
    process.stderr.close()
    assert any(step % 3 for step in seen if step > first)
