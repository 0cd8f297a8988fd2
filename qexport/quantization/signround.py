"""SignRound (Cheng et al. 2024): roundings learned by what they do to a block's output.

Every weight may be moved by half a step before it is rounded, and every scale be changed a little;
the signs of their gradients say which way, at a rate that falls to nothing. Beginning is what
GPTQ has found, and where learning has not made a block's output better, that is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qexport.blocks import Stream, lost_share, relative_errors
from qexport.quantization.activations import Passage
from qexport.quantization.fit import Fit
from qexport.quantization.rounding import Rounding
from qexport.ranks import summed, world_size
from qexport.tensor import storable

__all__ = ["SignRoundOptions", "learn"]

_FARTHEST = 0.5  # that a weight moves, in steps, and a scale, of itself


@dataclass(frozen=True)
class SignRoundOptions:
    """iterations of `batch` windows each; `lr` and `scale_lr` are the first steps of weights (in
    units of a scale) and of scales (of themselves), None: as far as half in all."""

    iterations: int = 100
    batch: int = 8
    lr: float | None = None
    scale_lr: float = 1e-3


def learn(
    passage: Passage,
    roundings: Mapping[str, Rounding],
    targets: Stream,
    options: SignRoundOptions,
    seed: int,
) -> tuple[dict[str, Rounding], float, float]:
    """Better roundings of a block's layers, and the block's error before and after.

    What passes is what the blocks before make of the text, `targets` what the dense model's own
    block makes of its own inputs. The block is left with the weights that were learned.
    """
    block, readers = passage.block, {}
    for name, rounding in roundings.items():
        readers[name] = _Learned(rounding)
        layer: Any = block.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", readers[name], unsafe=True)
    for parameter in block.parameters():
        parameter.requires_grad = False
    moved = [p for reader in readers.values() for p in reader.parameters()]
    before = _error(passage, targets)
    for parameter in moved:
        parameter.requires_grad = True
    _descend(passage, readers, targets, options, seed)
    after = _error(passage, targets)
    better = after < before
    found = {}
    for name, reader in readers.items():
        found[name] = reader.rounding() if better else roundings[name]
        layer = block.get_submodule(name)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        layer.weight.data.copy_(found[name].tensor().dequantize())
    return found, before, min(before, after)


def _descend(
    passage: Passage,
    readers: Mapping[str, "_Learned"],
    targets: Stream,
    options: SignRoundOptions,
    seed: int,
) -> None:
    lr = options.lr or 2 * _FARTHEST / options.iterations
    dice = torch.Generator().manual_seed(seed + (passage.index << 32))
    for step in range(options.iterations):
        order = torch.randperm(passage.count, generator=dice)
        chosen = order[: max(1, options.batch // world_size())]
        errors = relative_errors(passage.run(chosen), targets.read(chosen, passage.device))
        errors.mean().backward()  # type: ignore[no-untyped-call]
        left = 1 - step / options.iterations
        for reader in readers.values():
            reader.step(lr * left, options.scale_lr * left)


@torch.no_grad()
def _error(passage: Passage, targets: Stream) -> float:
    """The mean relative error of the block's output."""
    told = torch.tensor([0.0, passage.count], device=passage.device)
    with parametrize.cached():
        for part, made in passage.outputs():
            errors = relative_errors(made, targets.read(part, passage.device))
            told[0] += lost_share(errors) * (part.stop - part.start)
    total, count = summed(told).tolist()
    return float(total / count)


class _Learned(nn.Module):
    """Reads any weight as the quantized value of what is learned.

    moves    [out, in], in units of the first scales
    factors  [out, groups], of the first scales
    """

    def __init__(self, first: Rounding) -> None:
        super().__init__()
        self._first = first
        self.moves = nn.Parameter(torch.zeros_like(first.weight))
        self.factors = nn.Parameter(torch.ones_like(first.fit.scale))

    def forward(self, _: Tensor) -> Tensor:
        made: Tensor = _Round.apply(self.moves, self.factors, self._first)  # type: ignore[no-untyped-call]
        return made

    @torch.no_grad()
    def step(self, lr: float, scale_lr: float) -> None:
        """Down by the signs of the gradients, which are forgotten."""
        for parameter, rate, middle in ((self.moves, lr, 0.0), (self.factors, scale_lr, 1.0)):
            grad = parameter.grad  # an expert may have seen none of these windows
            parameter.sub_(
                summed(torch.zeros_like(parameter) if grad is None else grad).sign_(), alpha=rate
            )
            parameter.clamp_(middle - _FARTHEST, middle + _FARTHEST)
            parameter.grad = None

    @torch.no_grad()
    def rounding(self) -> Rounding:
        """What has been learned."""
        return _moved(self._first, self.moves.detach(), self.factors.detach())


def _moved(first: Rounding, moves: Tensor, factors: Tensor) -> Rounding:
    groups = first.fit.scale.shape
    steps = first.fit.scale.unsqueeze(-1)
    weight = (moves.view(*groups, -1) * steps).view(moves.shape) + first.weight
    fit = Fit(storable(first.fit.scale * factors, first.scheme), first.fit.zeros)
    return replace(first, weight=weight, fit=fit)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, moves: Tensor, factors: Tensor, first: Rounding) -> Tensor:
        moved = _moved(first, moves, factors)
        found = moved.tensor()
        ctx.save_for_backward(moved.weight, moved.fit.scale, found.codes)
        ctx.first = first
        return found.dequantize()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Straight through the rounding; where a code is at its end, through the scale alone."""
        weight, scale, codes = ctx.saved_tensors
        first: Rounding = ctx.first
        groups = (*scale.shape, -1)
        grad, units = grad.view(groups), (weight.view(groups) / scale.unsqueeze(-1))
        zero = first.scheme.grid.zero if first.fit.zeros is None else first.fit.zeros.unsqueeze(-1)
        values = codes.view(groups).float() - zero
        inside = (units - values).abs() <= _FARTHEST + 1e-3
        of_moves = (grad * inside * first.fit.scale.unsqueeze(-1)).view(weight.shape)
        slope = (values - units * inside) * first.fit.scale.unsqueeze(-1)
        return of_moves, (grad * slope).sum(-1), None
