"""Moments in 8 bits, and float16 with loss scaling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from qexport.errors import InputError, UnsupportedError
from qexport.formats import open_checkpoint
from qexport.formats.verify import verify
from qexport.source import open_source
from qexport.training import TrainConfig, state, train
from qexport.training.phases import start_by_blocks


def settings(model: Path, output: Path, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = {"max_steps": 6, "max_length": 32, "lr": 1e-3, "save_steps": 2}
    return TrainConfig(model, "builtin", output, "2", 32, **{**given, **changes})


@pytest.mark.filterwarnings("default")  # bitsandbytes' own
def test_moments_in_8_bits_and_a_resume(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large matrices' are bytes, embeddings' float32; a run that was stopped ends bit-equal."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings(tiny_model, whole, optimizer="adamw8bit"), Console(quiet=True))
    save = state.save
    with pytest.MonkeyPatch.context() as patch:

        def save_and_stop(*arguments: Any) -> None:
            save(*arguments)
            raise KeyboardInterrupt

        patch.setattr(state, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings(tiny_model, parts, optimizer="adamw8bit"), Console(quiet=True))
    saved = load_file(parts / "checkpoint-2" / "optimizer.safetensors")
    prefix = "model.layers.0.mlp.up_proj.parametrizations.weight.original"
    assert saved[f"{prefix}|state1"].dtype == torch.uint8
    table = next(name for name in saved if "embed_tokens" in name and name.endswith("|state1"))
    assert saved[table].dtype == torch.float32
    train(settings(tiny_model, parts, optimizer="adamw8bit"), Console(quiet=True))
    report = verify(open_checkpoint(whole), open_checkpoint(parts))
    assert report.exact, report.describe()


def test_without_bitsandbytes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match="pip install bitsandbytes"):
        train(settings(tiny_model, tmp_path / "run", optimizer="adamw8bit"), Console(quiet=True))


def test_fp16_end_to_end_wants_a_gpu(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # also where there is one
    with pytest.raises(UnsupportedError, match="--precision fp16 wants a GPU"):
        train(settings(tiny_model, tmp_path / "run", precision="fp16"), Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_blocks_in_float16(tiny_model: Path, tmp_path: Path) -> None:
    """By scaled losses it learns what float32 learns."""
    errors: dict[str, list[str]] = {}
    source = open_source(tiny_model)
    assert source is not None
    windows = torch.randint(0, 250, (64, 32), generator=torch.Generator().manual_seed(0))
    for precision in ("fp32", "fp16"):
        config = settings(
            tiny_model, tmp_path / precision, block_epochs=3, block_windows=64, block_lr=1e-3
        )
        lines = errors.setdefault(precision, [])
        console = Console(quiet=True)
        console.print = lambda text, lines=lines, **_: lines.append(text)  # type: ignore[method-assign]
        run = tmp_path / precision
        start_by_blocks(config, source, torch.bfloat16, windows, precision, False, run, console)
    last = {name: float(lines[-1].split()[-1].rstrip("%")) for name, lines in errors.items()}
    first = float(errors["fp16"][-1].split("error ")[1].split("%")[0])
    assert last["fp16"] < 0.8 * first
    assert last["fp16"] == pytest.approx(last["fp32"], rel=0.05)


def test_a_mistake_in_a_sentence(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="fp16 does not go with --deepspeed"):
        settings(tiny_model, tmp_path, precision="fp16", deepspeed=Path("zero.json"))
    with pytest.raises(InputError, match="adamw8bit goes with neither"):
        settings(tiny_model, tmp_path, optimizer="adamw8bit", deepspeed=Path("zero.json"))


def test_numbers_of_an_optimizer_are_kept_beside_its_tensors(tmp_path: Path) -> None:
    values = json.dumps({"numbers": {"weight|step": 3}, "progress": {}})
    (tmp_path / "state.json").write_text(values)
    from safetensors.torch import save_file

    save_file({"weight|state1": torch.ones(2, 2)}, tmp_path / "optimizer.safetensors")
    model = torch.nn.Linear(2, 2, bias=False)
    found = {field: value for _, field, value in state.load_moments(tmp_path, model)}
    assert found["step"] == 3 and torch.equal(found["state1"], torch.ones(2, 2))
