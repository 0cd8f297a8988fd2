"""Distillation: the loss is the textbook's, its gradient autograd's, the cache tells the same."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from qexport.training import TrainConfig, train
from qexport.training.distill import (
    CachedTeacher,
    SoftTargets,
    distillation_loss,
    soft_targets,
)


def textbook(
    logits: Tensor, labels: Tensor, teacher: Tensor, weight: float, temperature: float
) -> Tensor:
    """Summed over positions, with every probability of the teacher."""
    student = (logits / temperature).log_softmax(-1)
    expected = (teacher / temperature).softmax(-1)
    divergence = F.kl_div(student, expected, reduction="sum") * temperature**2
    return (1 - weight) * F.cross_entropy(logits, labels, reduction="sum") + weight * divergence


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_with_all_tokens_it_is_the_textbooks(weight: float, temperature: float) -> None:
    torch.manual_seed(0)
    mine = torch.randn(7, 50, requires_grad=True)
    other = mine.detach().clone().requires_grad_()
    teacher, labels = 3 * torch.randn(7, 50), torch.randint(0, 50, (7,))
    targets = soft_targets(teacher, 50, temperature)
    loss = distillation_loss(mine, labels, targets, weight, temperature)
    wanted = textbook(other, labels, teacher, weight, temperature)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    loss.backward()  # type: ignore[no-untyped-call]
    wanted.backward()  # type: ignore[no-untyped-call]
    assert mine.grad is not None and other.grad is not None
    assert torch.allclose(mine.grad, other.grad, atol=1e-5)


def test_the_gradient_with_a_tail_is_autograds() -> None:
    """Of the divergence between k tokens and "any other"."""
    torch.manual_seed(1)
    mine = torch.randn(5, 40, dtype=torch.float64).float().requires_grad_()
    other = mine.detach().clone().double().requires_grad_()
    labels = torch.randint(0, 40, (5,))
    targets = soft_targets(4 * torch.randn(5, 40), 6, 1.0)
    distillation_loss(mine, labels, targets, 1.0, 1.0).backward()  # type: ignore[no-untyped-call]
    student = other.softmax(-1)
    top = student.gather(-1, targets.tokens)
    known = targets.probabilities.double()
    rest = 1 - known.sum(-1)
    loss = (known * (known.log() - top.log())).sum()
    loss = loss + (rest * (rest.log() - (1 - top.sum(-1)).log())).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert mine.grad is not None and other.grad is not None
    assert torch.allclose(mine.grad.double(), other.grad, atol=1e-5)


def test_masked_positions_do_not_count() -> None:
    torch.manual_seed(2)
    logits, teacher = torch.randn(6, 30), torch.randn(6, 30)
    labels = torch.tensor([1, -100, 3, -100, 5, 6])
    targets = soft_targets(teacher, 8, 1.0)
    kept = labels != -100
    whole = distillation_loss(logits, labels, targets, 0.5, 1.0)
    part = SoftTargets(targets.tokens[kept], targets.probabilities[kept])
    assert whole == distillation_loss(logits[kept], labels[kept], part, 0.5, 1.0)


class Counted:
    """A teacher that counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def targets(self, windows: Tensor, tokens: Tensor) -> SoftTargets:
        self.asked += windows.tolist()
        assert torch.equal(tokens[:, 0], windows)
        numbers = windows[:, None, None] + torch.arange(3)
        return SoftTargets(numbers.expand(-1, 2, -1), torch.full((len(windows), 2, 3), 0.25))


def test_the_cache_is_filled_once(tmp_path: Path) -> None:
    """A run that was killed asks on where it stopped."""
    rows = torch.arange(10)[:, None].expand(10, 2)
    order = [7, 2, 9, 4, 0, 1]
    first = Counted()
    for done in CachedTeacher(tmp_path, 10, 2, 3).fill(order, rows, first, 2):
        if done == 4:
            break
    second, again = Counted(), CachedTeacher(tmp_path, 10, 2, 3)
    list(again.fill(order, rows, second, 2))
    assert first.asked == [7, 2, 9, 4] and second.asked == [0, 1]
    found = again.targets(torch.tensor([9, 1]), rows[:2])
    assert found.tokens[:, 0].tolist() == [[9, 10, 11], [1, 2, 3]]
    assert bool((found.probabilities == 0.25).all())


def test_cached_and_live_teachers_train_alike(tiny_model: Path, tmp_path: Path) -> None:
    """Probabilities are rounded to float16 in between."""
    losses = []
    for teacher in ("live", "cached"):
        config = TrainConfig(
            model=tiny_model,
            data="builtin",
            output=tmp_path / teacher,
            bits="2",
            group_size=32,
            max_steps=4,
            max_length=32,
            batch_size=2,
            distill=1.0,
            lr=1e-2,
            precision="fp32",
            teacher=teacher,
        )
        losses.append(train(config, Console(quiet=True))["final_loss"])
        assert not (tmp_path / teacher / ".teacher").exists()
    assert 0 < losses[0] < 1  # no cross-entropy in it, which is above five
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_run_without_a_loss_to_draw_is_a_run(tiny_model: Path, tmp_path: Path) -> None:
    """A student that is its teacher: a divergence of 0, which no logarithmic axis has."""
    config = TrainConfig(
        tiny_model,
        "builtin",
        tmp_path / "run",
        "16",
        distill=1.0,
        teacher="live",
        teacher_top_k=0,
        precision="fp32",
        lr=1e-9,
        max_steps=3,
        max_length=16,
    )
    train(config, Console(quiet=True))
    assert (tmp_path / "run" / "report.html").exists()
