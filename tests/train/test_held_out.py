"""The loss of held-out text, taken with few passes over the weights, is that of each window."""

import contextlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qexport.grid import Scheme
from qexport.paretoq import WIDTHS
from qexport.training.held_out import batches, held_out_loss
from qexport.training.prepare import FakeQuantize, prepare
from qexport.training.text import Windows


def test_short_windows_are_read_together() -> None:
    assert batches(Windows(torch.zeros(70, 16)), 1) == [
        slice(0, 32),
        slice(32, 64),
        slice(64, 70),
    ]
    assert batches(Windows(torch.zeros(3, 2048)), 2) == [slice(0, 2), slice(2, 3)]


def test_weights_are_quantized_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    modules = prepare(model, lambda _: Scheme(WIDTHS["2"].grid, 32), "mse", torch.bfloat16)
    windows = Windows(torch.randint(0, 250, (70, 16), dtype=torch.int32))
    each = []
    with torch.no_grad():
        for row in range(len(windows)):
            ids = windows.tokens[row, None].long()
            each.append(float(model.eval()(input_ids=ids, labels=ids).loss))
    calls = 0
    quantize = FakeQuantize.forward

    def counted(self: FakeQuantize, weight: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return quantize(self, weight)

    monkeypatch.setattr(FakeQuantize, "forward", counted)
    loss, targets = held_out_loss(model, windows, 1, torch.device("cpu"), contextlib.nullcontext)
    assert calls == len(modules)
    assert targets == 70 * 15
    assert loss == pytest.approx(sum(each) / 70, rel=1e-5)
    model.model.layers[0].mlp.down_proj.parametrizations.weight.original.data.neg_()
    other, _ = held_out_loss(model, windows, 1, torch.device("cpu"), contextlib.nullcontext)
    assert other != loss  # nothing of the first time is kept
