"""Distillation from the dense model: what it would have said is a richer target than one token.

    loss = (1 - w) * cross-entropy + w * T^2 * KL(teacher || student), both at temperature T

(Hinton et al. 2015; forward KL as in QAD and LLM-QAT). The teacher's probabilities of the k most
likely tokens are enough: what is left of them is one more outcome, "any other token", so that the
divergence is still one between probabilities. They fit on a disk, and the teacher need not stay in
memory.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qexport.output import write_json
from qexport.training.text import IGNORED

__all__ = [
    "CachedTeacher",
    "LiveTeacher",
    "SoftTargets",
    "Teacher",
    "distillation_loss",
    "soft_targets",
]

_DONE = "teacher.json"
_SMALLEST = 1e-6  # of a probability that is divided by


class SoftTargets(NamedTuple):
    """tokens int64 [..., k], and the teacher's probabilities of them, float32 [..., k]."""

    tokens: Tensor
    probabilities: Tensor


def soft_targets(logits: Tensor, count: int, temperature: float) -> SoftTargets:
    """The `count` most likely tokens of a teacher's logits [..., vocabulary]."""
    scaled = logits.float() / temperature
    top, tokens = scaled.topk(min(count, logits.shape[-1]), dim=-1)
    return SoftTargets(tokens, (top - scaled.logsumexp(-1, keepdim=True)).exp())


def distillation_loss(
    logits: Tensor, labels: Tensor, targets: SoftTargets, weight: float, temperature: float
) -> Tensor:
    """The loss above, summed over positions whose label is not IGNORED.

    logits [n, vocabulary], labels int64 [n], targets [n, k]; differentiable in logits.
    """
    kept = labels != IGNORED
    if not bool(kept.all()):
        logits, labels = logits[kept], labels[kept]
        targets = SoftTargets(targets.tokens[kept], targets.probabilities[kept])
    loss: Tensor = _Distillation.apply(logits, labels, *targets, weight, temperature)  # type: ignore[no-untyped-call]
    return loss


class _Distillation(torch.autograd.Function):
    """By hand, for one buffer the size of the logits instead of five."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        tokens: Tensor,
        teacher: Tensor,
        weight: float,
        temperature: float,
    ) -> Tensor:
        wide = logits.float()
        entropy = wide.logsumexp(-1) - wide.gather(-1, labels[:, None])[:, 0]
        total = (wide / temperature).logsumexp(-1, keepdim=True)
        student = wide.gather(-1, tokens) / temperature - total
        rest = (1 - student.exp().sum(-1)).clamp(min=_SMALLEST)
        teacher_rest = (1 - teacher.sum(-1)).clamp(min=0)
        known = teacher.clamp(min=_SMALLEST).log()
        divergence = (teacher * (known - student)).sum(-1)
        divergence += teacher_rest * (teacher_rest.clamp(min=_SMALLEST).log() - rest.log())
        ctx.save_for_backward(logits, labels, tokens, teacher, teacher_rest / rest)
        ctx.weight, ctx.temperature = weight, temperature
        return (1 - weight) * entropy.sum() + weight * temperature**2 * divergence.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """d KL / d logits = student - target, whose tail has the student's own shape."""
        logits, labels, tokens, teacher, tail = ctx.saved_tensors
        weight, temperature = ctx.weight, ctx.temperature
        student = torch.softmax(logits.float() / temperature, -1)
        top = student.gather(-1, tokens) - teacher
        found = student.mul_(1 - tail[:, None]).scatter_(-1, tokens, top)
        found.mul_(weight * temperature)
        if weight < 1:
            found.add_(torch.softmax(logits.float(), -1), alpha=1 - weight)
            found.scatter_add_(-1, labels[:, None], found.new_full((len(labels), 1), weight - 1))
        found.mul_(grad)
        return found.to(logits.dtype), None, None, None, None, None


class Teacher(Protocol):
    """Who knows the dense model's answers."""

    def targets(self, windows: Tensor, tokens: Tensor) -> SoftTargets:
        """For windows int64 [n], by their numbers and tokens [n, length]: [n, length, k]."""


class LiveTeacher:
    """The dense model in memory; `autocast` makes the context of its forward passes."""

    def __init__(
        self,
        model: Any,
        count: int,
        temperature: float,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._model, self._count, self._temperature = model, count, temperature
        self._autocast = autocast

    @torch.no_grad()
    def targets(self, windows: Tensor, tokens: Tensor) -> SoftTargets:
        """Asked anew each time."""
        with self._autocast():
            logits = self._model(input_ids=tokens.to(self._model.device), use_cache=False).logits
        return soft_targets(logits, self._count, self._temperature)


class CachedTeacher:
    """Soft targets of windows [n, length] in two mapped files, made once and kept for a resume."""

    def __init__(self, folder: Path, windows: int, length: int, count: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        shape = windows, length, count
        self._tokens = _mapped(folder / "tokens.bin", shape, torch.int32)
        self._probabilities = _mapped(folder / "probabilities.bin", shape, torch.float16)

    def fill(
        self, order: Sequence[int], rows: Tensor, asked: Teacher, batch_size: int
    ) -> Iterator[int]:
        """Ask about `rows` [n, length] in this order; yields how many are there after each batch.

        Those that a killed run has asked about already are there at once.
        """
        for start in range(self._done(), len(order), batch_size):
            numbers = torch.tensor(order[start : start + batch_size])
            found = asked.targets(numbers, rows[numbers].long())
            self._tokens[numbers] = found.tokens.to("cpu", torch.int32)
            self._probabilities[numbers] = found.probabilities.to("cpu", torch.float16)
            write_json(self._folder / _DONE, {"done": start + len(numbers)})
            yield start + len(numbers)

    def targets(self, windows: Tensor, tokens: Tensor) -> SoftTargets:
        """Read from the disk."""
        numbers, device = windows.cpu(), tokens.device
        return SoftTargets(
            self._tokens[numbers].long().to(device), self._probabilities[numbers].float().to(device)
        )

    def _done(self) -> int:
        try:
            return int(json.loads((self._folder / _DONE).read_text(encoding="utf-8"))["done"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def _mapped(path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Memory that is a file's, all of which is there: a full disk is an error here, no signal."""
    size = math.prod(shape)
    with path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size * dtype.itemsize))
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
