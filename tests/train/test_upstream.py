"""The `paretoq` recipe is ParetoQ: a plain torch loop with its published equations loses the same.

The loop below shares nothing with the trainer but the model, the text and the order of windows.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from qexport.data import documents, tokenize, windows
from qexport.modelling import load_tokenizer
from qexport.tiny import write_tiny_model
from qexport.training import TrainConfig, train
from qexport.training.recipe import RECIPES
from tests.conftest import WIDTHS

STEPS, LENGTH, BATCH, WARMUP, RATE = 16, 64, 4, 4, 5e-4


class Published(nn.Module):
    """Table 1 of arXiv 2502.02631 as its code has it, by autograd alone; one alpha for each row."""

    def __init__(self, weight: Tensor, bits: str) -> None:
        super().__init__()
        self.bits = bits
        rows = weight.abs()
        alpha = rows.mean(-1, keepdim=True) if bits == "1" else rows.amax(-1, keepdim=True)
        self.alpha = nn.Parameter(alpha / {"3": 3, "4": 7}.get(bits, 1))
        self.slope = 1 / math.sqrt(weight.numel() * {"3": 3, "4": 7}.get(bits, 1))

    def forward(self, weight: Tensor) -> Tensor:
        fixed = self.alpha.detach()
        alpha = fixed + self.slope * (self.alpha - fixed)  # its value, and less of its gradient
        if self.bits == "1":
            passed = fixed * (weight / fixed).clamp(-1, 1)
            return alpha * weight.sign().detach() + passed - passed.detach()
        low, high = {"3": (-4, 3), "4": (-8, 7)}.get(self.bits, (-0.99, 0.99))
        inside = (weight / alpha).clamp(low, high)
        if self.bits == "2":
            level = ((2 * inside - 0.5).round() + 0.5) / 2
        elif self.bits == "1.58":
            level = (1.5 * inside).round() / 1.5
        else:
            level = inside.round()
        return alpha * (inside + (level - inside).detach())


def plain_loop(folder: Path, bits: str) -> list[float]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            parametrize.register_parametrization(
                module, "weight", Published(module.weight.detach(), bits), unsafe=True
            )
    tokenizer = load_tokenizer(folder)
    rows = windows(
        tokenize(list(documents("builtin", "train", tokenizer)), tokenizer), LENGTH, "--length"
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        turn = (step - WARMUP) / (STEPS - WARMUP)
        share = step / WARMUP if step < WARMUP else 0.5 * (1 + math.cos(math.pi * turn))
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        batch = rows[order[step * BATCH : (step + 1) * BATCH]]
        logits = model(input_ids=batch).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, with all its bits: nothing is rounded but what is quantized, and nothing ties."""
    folder = write_tiny_model(tmp_path_factory.mktemp("float32") / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(1 + 0.01 * torch.rand_like(parameter))
    loaded.save_pretrained(folder)
    return folder


def curve(model: Path, output: Path, bits: str, **changes: Any) -> list[float]:
    config = TrainConfig(
        model=model,
        data="builtin",
        output=output,
        bits=bits,
        max_steps=STEPS,
        max_length=LENGTH,
        batch_size=BATCH,
        warmup=WARMUP / STEPS,
        precision="fp32",
        **changes,
    )
    train(config, Console(quiet=True))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_curve_is_the_published_equations(model: Path, tmp_path: Path, bits: str) -> None:
    """Step by step."""
    published = {"scale_dtype": "float32", "scale_init": "paper", "recipe": "paretoq"}
    mine = curve(model, tmp_path / "run", bits, lr=RATE, scale_lr=RATE, **published)
    theirs = plain_loop(model, bits)
    assert len(mine) == STEPS and theirs[-1] < theirs[0] - 0.05
    assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.fixture(scope="module")
def learned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model that has something to lose."""
    run = tmp_path_factory.mktemp("learned") / "run"
    config = TrainConfig(
        *(model, "builtin", run, "16"),
        max_steps=120,
        max_length=LENGTH,
        batch_size=16,
        lr=5e-3,
        precision="fp32",
    )
    train(config, Console(quiet=True))
    return run


@pytest.mark.parametrize("bits", WIDTHS)
def test_our_recipe_ends_lower(learned: Path, tmp_path: Path, bits: str) -> None:
    """On the same data, steps and seed, per channel; both at their own rates times ten."""
    shared: dict[str, Any] = {"max_steps": 40, "max_length": LENGTH, "batch_size": BATCH}
    published: dict[str, Any] = {"scale_dtype": "float32", "scale_init": "paper"}
    ends = {}
    for name, recipe, changes in (("published", "paretoq", published), ("ours", "fast", {})):
        rate = 10 * RECIPES[recipe][bits].lr
        config = TrainConfig(
            model=learned,
            data="builtin",
            output=tmp_path / name,
            bits=bits,
            recipe=recipe,
            lr=rate,
            precision="fp32",
            **shared,
            **changes,
        )
        ends[name] = train(config, Console(quiet=True))["eval_loss"]
    assert ends["ours"] < ends["published"] - 0.01, ends
