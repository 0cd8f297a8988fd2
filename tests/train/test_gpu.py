"""What must hold on a CUDA device too: the same codes, and a run that resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qexport.formats import open_checkpoint
from qexport.grid import Scheme
from qexport.paretoq import WIDTHS, effective_scale, fake_quantize, initial_alpha
from qexport.tensor import quantize
from qexport.training import TrainConfig, state, train
from qexport.training.fuse import why_not

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bits", list(WIDTHS))
def test_codes_and_values_are_those_of_the_cpu(bits: str) -> None:
    scheme = Scheme(WIDTHS[bits].grid, 64)
    weight = torch.randn(128, 256) * 0.02
    alpha = initial_alpha(weight, scheme, "mse")
    here = quantize(weight, effective_scale(alpha, scheme), scheme)
    there = quantize(weight.cuda(), effective_scale(alpha.cuda(), scheme), scheme)
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(there.scales.cpu(), here.scales)
    values = fake_quantize(weight.cuda(), alpha.cuda(), scheme)
    assert torch.equal(values.cpu(), here.dequantize())


def stop_after_a_checkpoint(config: TrainConfig) -> None:
    save = state.save
    with pytest.MonkeyPatch.context() as patch:

        def save_and_stop(*arguments: object) -> None:
            save(*arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        patch.setattr(state, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, Console(quiet=True))


def test_a_run_is_resumed(tiny_model: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        tiny_model, "builtin", tmp_path / "run", "2", 32, max_steps=6, max_length=32, save_steps=2
    )
    stop_after_a_checkpoint(config)
    resumed = train(config, Console(quiet=True))
    whole = train(replace(config, output=tmp_path / "whole"), Console(quiet=True))
    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-3)
    assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-3)
    assert len(open_checkpoint(config.output).modules) == 14


@pytest.mark.parametrize("bits", list(WIDTHS))
def test_compiled_quantizers_change_no_value(bits: str) -> None:
    scheme = Scheme(WIDTHS[bits].grid, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert why_not([scheme], "paper", torch.device("cuda"), dtype) is None


@pytest.mark.parametrize("changes", [{"precision": "fp16"}, {"optimizer": "adamw8bit"}])
def test_a_run_in_fewer_bits_is_resumed(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The scale of losses, and moments in bytes, come back from the checkpoint."""
    config = TrainConfig(
        *(tiny_model, "builtin", tmp_path / "run", "2", 32),
        max_steps=6,
        max_length=32,
        save_steps=2,
        block_epochs=1,
        block_windows=8,
        **changes,
    )
    stop_after_a_checkpoint(config)
    resumed = train(config, Console(quiet=True))
    whole = train(replace(config, output=tmp_path / "whole"), Console(quiet=True))
    assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-2)
