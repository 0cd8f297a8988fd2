"""The loss of held-out text: the mean over its targets, however they are spread over batches."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from qexport.ranks import rank, summed, world_size
from qexport.training.block import parts
from qexport.training.text import IGNORED, Windows

__all__ = ["batches", "held_out_loss", "summed_loss"]

_AT_ONCE = 512  # tokens, at least: reading all weights for a few takes as long


def batches(windows: Windows, batch_size: int) -> list[slice]:
    """The windows that are read at once: `batch_size`, or more where they are short."""
    return list(parts(len(windows), max(batch_size, _AT_ONCE // windows.tokens.shape[1])))


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [2]: cross-entropy of [n, length, vocabulary], summed over targets, and their number.

    labels [n, length] are the tokens themselves, IGNORED where one is no target.
    """
    wanted = labels[:, 1:].flatten().to(logits.device)
    made = logits[:, :-1].flatten(0, 1).float()
    loss = cross_entropy(made, wanted, reduction="sum", ignore_index=IGNORED)
    return torch.stack([loss.double(), (wanted != IGNORED).sum().double()])


@torch.no_grad()
def held_out_loss(
    model: Any, windows: Windows, batch_size: int, device: torch.device, context: Callable[[], Any]
) -> tuple[float, int]:
    """Mean cross-entropy over all targets, and their number; `context` is that of forward passes.

    Batches are shared out over the processes. All of them run as many, as a sharded model wants,
    and a batch that is there for that alone counts for nothing.
    """
    model.eval()
    every = batches(windows, batch_size)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with _quantized_once(model):
        for first in range(0, len(every), world_size()):
            mine = first + rank()
            rows = every[min(mine, len(every) - 1)]
            with context():
                ids = windows.tokens[rows].long().to(device)
                logits = model(input_ids=ids, use_cache=False).logits
            if mine < len(every):
                total += summed_loss(logits, windows.labels(rows))
    loss, targets = summed(total).tolist()
    return loss / max(targets, 1), int(targets)


def _quantized_once(model: Any) -> contextlib.AbstractContextManager[None]:
    """Weights keep what they are read as; not those of a sharded model, which is nowhere whole."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return contextlib.nullcontext()
    return parametrize.cached()
