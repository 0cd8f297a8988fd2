"""Factors between inputs and weights that change no output: where AWQ and SmoothQuant meet.

The inputs of a layer are divided by a factor each, and its weights multiplied by the same. What
comes before the layer does the division: a norm by its weight, or a linear layer by its rows.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fold", "tie"]

_BEFORE = {  # what makes the inputs of a stage, by its first layer
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}


def tie(block: nn.Module, stage: str) -> Callable[[Tensor], Tensor] | None:
    """How factors [in] of a stage hang together: several query heads share the rows of a value.

    None where nothing comes before the stage that could take factors.
    """
    modules = dict(block.named_modules())
    layer, before = modules[stage], modules.get(_BEFORE[stage])
    if before is None or not (isinstance(before, nn.Linear) or _multiplies(before)):
        return None
    assert isinstance(layer, nn.Linear)
    if not isinstance(before, nn.Linear) or before.out_features == layer.in_features:
        return lambda factors: factors
    head = getattr(modules["self_attn"], "head_dim", None)
    if head is None or before.out_features % head or layer.in_features % before.out_features:
        return None
    heads = before.out_features // head

    def shared(factors: Tensor) -> Tensor:
        grouped = factors.view(heads, -1, head)
        return grouped.square().mean(1, keepdim=True).sqrt().expand_as(grouped).reshape(-1)

    return shared


@torch.no_grad()
def _multiplies(norm: Any) -> bool:
    """Whether a norm's output is a multiple of its weight: Gemma's is of one more than that, and
    OLMo's has none."""
    if getattr(norm, "weight", None) is None:
        return False
    x = torch.linspace(-1, 1, norm.weight.numel(), device=norm.weight.device)[None]
    twice = copy.deepcopy(norm)
    twice.weight.mul_(2)
    return torch.allclose(twice(x), 2 * norm(x), rtol=1e-3)


@torch.no_grad()
def fold(
    block: nn.Module, stage: str, names: tuple[str, ...], factors: Tensor, stored: torch.dtype
) -> list[str]:
    """Multiply the inputs' columns of layers `names` by factors [in] and divide before them.

    A norm is rounded to `stored`, in which it will be kept, and the columns are multiplied by what
    that has left of the factors, so that nothing is lost. Returns the names of the parameters that
    have changed, other than the layers' own.
    """
    name = _BEFORE[stage]
    before: Any = block.get_submodule(name)
    if isinstance(before, nn.Linear):
        head = factors.numel() // before.out_features
        rows = factors
        if head > 1:
            size: Any = block.get_submodule("self_attn").head_dim
            rows = factors.view(-1, head, size)[:, 0].reshape(-1)
        before.weight.div_(rows.unsqueeze(1))
        if before.bias is not None:
            before.bias.div_(rows)
        changed = [] if before.bias is None else [f"{name}.bias"]
    else:
        divided = (before.weight / factors).to(stored).float()
        factors = torch.where(divided == 0, torch.ones_like(factors), before.weight / divided)
        before.weight.copy_(torch.where(divided == 0, before.weight, divided))
        changed = [f"{name}.weight"]
    for layer in names:
        weight: Any = block.get_submodule(layer).weight
        weight.mul_(factors)
    return changed
