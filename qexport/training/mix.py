"""Masters are pulled to their quantized values every so many steps (WinQ, arXiv 2605.17471).

Weights that hover between two codes are settled by it, and the rest of the training adapts to that:
W <- a W + (1 - a) Q(W).
"""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from qexport.paretoq import fake_quantize
from qexport.ranks import assign, whole
from qexport.training.prepare import FakeQuantize

__all__ = ["Mixing", "mix_masters"]


@torch.no_grad()
def mix_masters(model: nn.Module, kept: float) -> None:
    """Once: `kept` is a."""
    for module in model.modules():
        for chain in getattr(module, "parametrizations", {}).values():
            if isinstance(chain[0], FakeQuantize):
                reader, master = chain[0], whole(chain.original)
                alpha = whole(reader.alpha)
                quantized = fake_quantize(master, alpha, reader.scheme)
                assign(chain.original, master.lerp(quantized, 1 - kept))


class Mixing(TrainerCallback):
    """After every `steps` optimizer steps, but not after the last one."""

    def __init__(self, steps: int, kept: float) -> None:
        self._steps, self._kept = steps, kept

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self._steps == 0 and state.global_step < state.max_steps:
            mix_masters(model, self._kept)
