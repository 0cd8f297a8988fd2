"""What changes how a run moves: gradients of rounding, mixing, rates, mixtures of text."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM

from qexport.errors import CheckpointError, InputError
from qexport.grid import Scheme
from qexport.paretoq import WIDTHS, fake_quantize, initial_alpha
from qexport.training import TrainConfig, train
from qexport.training.mix import mix_masters
from qexport.training.prepare import FakeQuantize, prepare
from qexport.training.text import MixedWindows, Windows
from qexport.training.trainer import QatTrainer

DAMPING = 0.21 * math.sqrt(2) * math.pi


def small(model: Path, folder: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"data": "builtin", "group_size": 32, "max_length": 32}
    return TrainConfig(model=model, output=folder / "run", bits="2", **{**settings, **changes})


@pytest.mark.parametrize("bits", list(WIDTHS))
def test_stable_gradients_are_the_rotated_triangles(bits: str) -> None:
    """In the middle of a step nearly none, where two meet the identity's."""
    width = WIDTHS[bits]
    scheme = Scheme(width.grid, None, torch.float32)
    assert width.grid.zero is not None
    torch.manual_seed(0)
    weight = torch.randn(6, 64) * 0.1
    alpha = initial_alpha(weight, scheme, "mse")
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    upstream = torch.randn(6, 64)
    for gradient in ("paper", "stable"):
        w, a = weight.clone().requires_grad_(), alpha.clone().requires_grad_()
        made = fake_quantize(w, a, scheme, gradient)
        made.backward(upstream)  # type: ignore[no-untyped-call]
        assert w.grad is not None and a.grad is not None
        found[gradient] = w.grad, a.grad
    steps = weight / (alpha * width.step)
    codes = (made.detach() / (alpha * width.step)).round(decimals=1)  # on the grid, zero taken off
    shift = 1.0 if width.grid.zero % 1 else 0.0
    c = DAMPING * torch.cos(math.pi * (steps + codes - shift))
    slopes = 2 / (1 + c) - 1
    paper, stable = found["paper"][0], found["stable"][0]
    inside = paper != 0
    assert torch.equal(inside, stable != 0) and bool(inside.any())
    assert torch.allclose(stable, paper * slopes, atol=1e-3)
    assert 0.03 < float(slopes[inside].min()) < 0.1 and 0.8 < float(slopes[inside].max()) < 1.2
    if bits == "1":  # a sign has no slope in alpha to be damped
        assert torch.allclose(found["paper"][1], found["stable"][1])
    else:
        assert not torch.allclose(found["paper"][1], found["stable"][1])


def test_mixing_pulls_masters_to_their_values(tiny_model: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prepare(model, lambda _: Scheme(WIDTHS["2"].grid, 32), "mse", torch.float32)
    chain = model.model.layers[0].mlp.up_proj.parametrizations.weight
    assert isinstance(chain[0], FakeQuantize)
    master, value = chain.original.detach().clone(), chain().detach().clone()
    norm = model.model.norm.weight.detach().clone()
    mix_masters(model, 0.2)
    assert torch.allclose(chain.original, 0.2 * master + 0.8 * value, atol=1e-6)
    assert torch.equal(chain(), value)  # nothing that is served has changed
    assert torch.equal(model.model.norm.weight, norm)


def test_mixing_comes_every_so_many_steps_but_the_last(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    monkeypatch.setattr("qexport.training.mix.mix_masters", lambda _, kept: seen.append(kept))
    config = small(tiny_model, tmp_path, max_steps=6, max_length=32, mix_steps=2, mix=0.3)
    train(config, Console(quiet=True))
    assert seen == [0.3, 0.3]


def test_scales_have_a_rate_of_their_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[tuple[float, int]] = []
    create = QatTrainer.create_optimizer

    def noted(self: QatTrainer, model: Any = None) -> torch.optim.Optimizer:
        made = create(self, model)
        groups.extend((group["lr"], len(group["params"])) for group in made.param_groups)
        return made

    monkeypatch.setattr(QatTrainer, "create_optimizer", noted)
    config = small(tiny_model, tmp_path, max_steps=1, max_length=32, lr=1e-4, scale_lr=3e-3)
    train(config, Console(quiet=True))
    assert groups == [(1e-4, 2 * 9 + 2), (3e-3, 14)]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    shares=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
    total=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_source_has_its_share_at_every_moment(
    sizes: list[int], shares: list[float], total: int, seed: int
) -> None:
    """Within one window; each source in whole passes, and the same again after a resume."""
    rows = Windows(torch.arange(sum(sizes))[:, None])
    weights = shares[: len(sizes)]
    mixed = MixedWindows(rows, total, seed, sizes, weights)
    met = [int(mixed[index]["window"]) for index in range(total)]
    again = MixedWindows(rows, total, seed, sizes, weights)
    assert [again.window(index) for index in reversed(range(total))] == met[::-1]
    assert mixed.first_windows() == list(dict.fromkeys(met))
    start = 0
    for size, weight in zip(sizes, weights, strict=True):
        mine = [window for window in met if start <= window < start + size]
        for begin in range(0, len(mine) - size + 1, size):
            assert set(mine[begin : begin + size]) == set(range(start, start + size))
        for end in (total // 3, total):
            count = sum(start <= window < start + size for window in met[:end])
            assert abs(count - end * weight / sum(weights)) <= len(sizes)
        start += size


def test_a_teacher_tells_no_more_tokens_than_there_are(tiny_model: Path, tmp_path: Path) -> None:
    asked = {"max_steps": 1, "distill": 0.5}
    more = small(tiny_model, tmp_path / "more", teacher_top_k=10**6, **asked)
    all_of_them = small(tiny_model, tmp_path / "all", teacher_top_k=0, **asked)
    losses = [train(config, Console(quiet=True))["train_loss"] for config in (more, all_of_them)]
    assert losses[0] == losses[1]


def test_few_documents_and_the_fast_recipe(tiny_model: Path, tmp_path: Path) -> None:
    """Fewer windows than GPTQ asks for."""
    path = tmp_path / "three.jsonl"
    path.write_text('{"text": "a few words of text, and a few more of them"}\n' * 3)
    config = small(tiny_model, tmp_path, max_steps=1, data=str(path), recipe="fast", max_length=16)
    assert train(config, Console(quiet=True))["steps"] == 1


def test_nothing_left_to_quantize(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no layer is left to be quantized"):
        train(small(tiny_model, tmp_path, max_steps=1, exclude=("*",)), Console(quiet=True))
    with pytest.raises(InputError, match="--module-bits =4: give PATTERN=BITS"):
        small(tiny_model, tmp_path, max_steps=1, module_bits=("=4",))


def test_a_finished_run_that_is_damaged(tiny_model: Path, tmp_path: Path) -> None:
    config = small(tiny_model, tmp_path, max_steps=1)
    train(config, Console(quiet=True))
    with (config.output / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match=r"was finished and is damaged .* --no-resume"):
        train(config, Console(quiet=True))


def test_sources_with_weights(tiny_model: Path, tmp_path: Path) -> None:
    lines = tmp_path / "a=b.txt"
    lines.write_text("one and another " * 300)
    config = small(tiny_model, tmp_path, max_steps=2, data=("builtin=1", f"{lines}=3"))
    assert config.sources == [("builtin", 1.0), (str(lines), 3.0)]
    assert train(config, Console(quiet=True))["eval_tokens"] > 0
    for wrong in (("builtin=1", str(lines)), ("builtin=0",), ()):
        with pytest.raises(InputError, match="weight"):
            TrainConfig(tiny_model, wrong, tmp_path / "no", "2")


def test_a_recipe_gives_way_to_what_is_given(tiny_model: Path, tmp_path: Path) -> None:
    plain = TrainConfig(tiny_model, "builtin", tmp_path / "run", "2")
    assert plain.settings.lr == 2e-5 and plain.settings.distill == 0.0
    given_ = TrainConfig(tiny_model, "builtin", tmp_path / "run", "2", lr=1e-3, distill=0.5)
    assert (given_.settings.lr, given_.settings.scale_lr) == (1e-3, 1e-3)
    for wrong in (
        {"recipe": "stew"},
        {"distill": 1.5},
        {"temperature": 0.0},
        {"mix_steps": -1},
        {"block_epochs": 1, "block_batch": 0},
        {"phase": "block"},
    ):
        with pytest.raises(InputError):
            TrainConfig(tiny_model, "builtin", tmp_path / "run", "2", **wrong)
