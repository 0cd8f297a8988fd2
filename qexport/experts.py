"""Mixtures of experts with an MLP of linear layers for each, as their checkpoints name them.

transformers keeps the experts of a layer in two tensors of three dimensions. To be quantized one by
one, each from the tokens that are sent to it, they are taken apart: `experts.3.gate_proj` is then a
layer like any other.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Experts", "expert_of", "is_router", "take_apart"]


class _Expert(nn.Module):
    def __init__(self, hidden: int, inter: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inter, bias=False)
        self.up_proj = nn.Linear(hidden, inter, bias=False)
        self.down_proj = nn.Linear(inter, hidden, bias=False)


class Experts(nn.ModuleList):
    """In the place of transformers' own `fused` ones, whose outputs it has."""

    def __init__(self, fused: Any) -> None:
        count, hidden, inter = fused.down_proj.shape
        super().__init__(_Expert(hidden, inter) for _ in range(count))
        self.act_fn = fused.act_fn

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Outputs [tokens, hidden] of the experts `chosen` [tokens, k], by `weights` alike."""
        made = torch.zeros_like(hidden)
        for number in sorted(set(chosen.flatten().tolist())):
            expert: Any = self[number]
            token, place = torch.where(chosen == number)
            mine = hidden[token]
            each = expert.down_proj(self.act_fn(expert.gate_proj(mine)) * expert.up_proj(mine))
            each = each * weights[token, place, None]
            made = made.index_add(0, token, each.to(made.dtype))
        return made


def take_apart(model: nn.Module) -> None:
    """Put `Experts` into a model on the meta device. Left alone is what has other parts than
    a gate, an up and a down projection without biases."""
    for name, module in list(model.named_modules()):
        parts = {part for part, _ in module.named_parameters(recurse=False)}
        if parts == {"gate_up_proj", "down_proj"} and hasattr(module, "act_fn"):
            parent, _, leaf = name.rpartition(".")
            with torch.device("meta"):
                setattr(model.get_submodule(parent), leaf, Experts(module))


def is_router(module: nn.Module) -> bool:
    """What sends tokens to experts; it stays dense."""
    return type(module).__name__.endswith("Router")


def expert_of(layer: str) -> str | None:
    """`mlp.experts.3` of `mlp.experts.3.gate_proj`; None for a layer of no expert."""
    parent = layer.rpartition(".")[0]
    kind, _, number = parent.rpartition(".")
    return parent if kind.endswith("experts") and number.isdigit() else None
