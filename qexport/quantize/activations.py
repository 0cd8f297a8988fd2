"""What the layers of a block see of the calibration text, and errors of their outputs by it."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qexport.blocks import Blocks, Stream
from qexport.errors import QexportError
from qexport.precision import autocast
from qexport.ranks import largest, summed

__all__ = ["STAGES", "Seen", "importance", "look", "output_error"]

STAGES = (  # layers that have the same inputs, in the order in which they run
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Seen:
    """Of a layer's inputs X [tokens, in], float32.

    hessian   X^T X [in, in]
    largest   max |X| of each input [in]
    """

    hessian: Tensor
    largest: Tensor


class _Enough(Exception):  # noqa: N818  # not an error: the rest of a forward pass is not needed
    pass


@torch.no_grad()
def look(
    blocks: Blocks,
    index: int,
    block: nn.Module,
    names: Sequence[str],
    inputs: Stream,
    rows: Sequence[slice],
    precision: str,
) -> dict[str, Seen]:
    """What each layer named sees when batches `rows` of the block's inputs pass through it.

    No more of the block is run than its last layer named needs. Of several processes each has text
    of its own, and all are told of the whole. Raises QexportError for inputs that
    are not finite.
    """
    device = next(block.parameters()).device
    layers: dict[str, Any] = {name: block.get_submodule(name) for name in names}
    found = {
        name: Seen(
            torch.zeros(layer.in_features, layer.in_features, device=device),
            torch.zeros(layer.in_features, device=device),
        )
        for name, layer in layers.items()
    }

    def watch(name: str, last: bool) -> Any:
        def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen = given[0].flatten(0, -2).float()
            found[name].hessian.addmm_(seen.T, seen)
            found[name].largest.copy_(torch.maximum(found[name].largest, seen.abs().amax(0)))
            if last:
                raise _Enough

        return layers[name].register_forward_pre_hook(add)

    hooks = [watch(name, name == names[-1]) for name in names]
    try:
        for part in rows:
            with contextlib.suppress(_Enough), autocast(precision, device):
                blocks.run(index, block, inputs.read(part, device))
    finally:
        for hook in hooks:
            hook.remove()
    for name, seen in found.items():
        summed(seen.hessian)
        largest(seen.largest)
        if not bool(seen.hessian.diagonal().isfinite().all()):
            raise QexportError(
                f"the inputs of {blocks.name(index)}{name} are not finite (NaN or infinite); check "
                "the model, or choose --precision fp32."
            )
    return found


def importance(hessian: Tensor) -> Tensor:
    """[in] how much each input matters, about 1; inputs never active count a little."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not bool(mean > 0):
        return torch.ones_like(diagonal)
    return (diagonal / mean).clamp(min=1e-6)


def output_error(weight: Tensor, made: Tensor, hessian: Tensor) -> float:
    """The squared error of a layer's output, relative to that output's square."""
    whole = float(((weight @ hessian) * weight).sum())
    lost = made - weight
    return float(((lost @ hessian) * lost).sum()) / max(whole, torch.finfo(torch.float32).tiny)
