"""Bits where they count: how much the loss grows by a layer's rounding, and widths by that.

The loss of a model whose weights are a little off by D has, beside nothing of first order, half of
`sum_ij g_i (D H D^T)_ii` for each layer, with H = X^T X of its inputs and g the mean squares of the
gradients of its outputs: the Fisher matrix as KFAC takes it apart (Martens and Grosse 2015), its
outputs' side by its diagonal. One pass forward and backward over some text tells both for all.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qexport.errors import InputError
from qexport.grid import Scheme
from qexport.quantization.fit import fit

__all__ = ["Losses", "measure", "widths_for"]

Losses = dict[str, dict[str, float]]  # by layer and width


def measure(
    model: Any,
    windows: Tensor,
    layers: Mapping[str, Sequence[tuple[str, Scheme]]],
    tell: Callable[[str], None],
) -> Losses:
    """What the loss of `model` (float32) grows by, for every width that a layer may have.

    windows   tokens [n, length]
    """
    inputs: dict[str, Tensor] = {}
    slopes: dict[str, Tensor] = {}
    hooks = list(_watch(model, layers, inputs, slopes))
    for number, window in enumerate(windows):
        tokens = window.unsqueeze(0).to(model.device)
        model.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        tell(f"sensitivity: window {number + 1}/{len(windows)}")
    for hook in hooks:
        hook.remove()
    count = windows.numel()
    found: Losses = {}
    for name, choices in layers.items():
        weight = model.get_submodule(name).weight.detach()
        matters = inputs[name].diagonal() / inputs[name].diagonal().mean()
        found[name] = {}
        for bits, scheme in choices:
            best = fit(weight, scheme, matters, coarse=True)
            lost = best.codes(weight, scheme).dequantize() - weight
            rows = ((lost @ inputs[name]) * lost).sum(-1)
            # gradients are of the mean loss of a window: of its sum, length times as large
            found[name][bits] = 0.5 * float(rows @ slopes[name]) * windows.shape[1] ** 2 / count**2
    return found


def _watch(
    model: nn.Module,
    layers: Mapping[str, Any],
    inputs: dict[str, Tensor],
    slopes: dict[str, Tensor],
) -> Iterator[Any]:
    for name in layers:
        layer: Any = model.get_submodule(name)
        inputs[name] = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
        slopes[name] = torch.zeros(layer.out_features, device=layer.weight.device)

        def see(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
            rows = given[0].detach().flatten(0, -2).float()
            inputs[name].addmm_(rows.T, rows)

        def feel(_: nn.Module, __: Any, given: tuple[Tensor, ...], name: str = name) -> None:
            slopes[name].add_(given[0].flatten(0, -2).float().square().sum(0))

        yield layer.register_forward_pre_hook(see)
        yield layer.register_full_backward_hook(feel)


def widths_for(
    losses: Losses,
    sizes: Mapping[str, Mapping[str, float]],
    weights: Mapping[str, int],
    together: Sequence[Sequence[str]],
    target: float,
) -> dict[str, str]:
    """A width for every layer, so that their bits per weight are at most `target`.

    sizes     bits per weight of each width of each layer, scales and all
    weights   how many each has
    together  layers that are to have the same width: engines fuse them

    From the narrowest on, where a bit buys most of the loss is widened first. Raises InputError
    where the narrowest are too wide already.
    """
    groups = [list(names) for names in together]
    at = [0] * len(groups)
    widths = [_narrow_first(losses[names[0]], sizes[names[0]]) for names in groups]
    total = sum(weights.values())

    def cost(group: int, step: int) -> float:
        return sum(weights[n] * sizes[n][widths[group][step]] for n in groups[group])

    def loss(group: int, step: int) -> float:
        return sum(losses[n][widths[group][step]] for n in groups[group])

    def offers(group: int) -> Iterator[tuple[float, int, int]]:
        now = at[group]
        for step in range(now + 1, len(widths[group])):
            gain = loss(group, now) - loss(group, step)
            yield -gain / (cost(group, step) - cost(group, now)), group, step

    used = sum(cost(group, 0) for group in range(len(groups)))
    if used > target * total:
        raise InputError(
            f"--target-bpw {target:g} is not to be had: the narrowest widths come to "
            f"{used / total:.3f}, scales counted; give more, or larger groups."
        )
    queue = [min(offers(group)) for group in range(len(groups)) if len(widths[group]) > 1]
    heapq.heapify(queue)
    while queue:
        _, group, step = heapq.heappop(queue)
        more = cost(group, step) - cost(group, at[group])
        if used + more > target * total:
            continue
        used += more
        at[group] = step
        further = list(offers(group))
        if further:
            heapq.heappush(queue, min(further))
    return {name: widths[i][at[i]] for i, names in enumerate(groups) for name in names}


def _narrow_first(choices: Mapping[str, float], sizes: Mapping[str, float]) -> list[str]:
    return sorted(choices, key=lambda bits: sizes[bits])
