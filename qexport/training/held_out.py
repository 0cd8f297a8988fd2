"""The loss of held-out text: the mean over its targets, however they are spread over batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qexport.ranks import rank, summed, world_size
from qexport.training.block import parts
from qexport.training.text import IGNORED, Windows

__all__ = ["held_out_loss", "summed_loss"]


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
    batches = list(parts(len(windows), batch_size))
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(0, len(batches), world_size()):
        mine = first + rank()
        rows = batches[min(mine, len(batches) - 1)]
        with context():
            logits = model(input_ids=windows.tokens[rows].long().to(device), use_cache=False).logits
        if mine < len(batches):
            total += summed_loss(logits, windows.labels(rows))
    loss, targets = summed(total).tolist()
    return loss / max(targets, 1), int(targets)
