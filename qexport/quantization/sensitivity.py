"""Bits where they count: how far a layer's rounding moves the model, and widths by that.

A model whose weights are a little off by D diverges from itself (KL, to second order: there is no
first) by half of `sum_i g_i (D H D^T)_ii` for each layer, with H = X^T X of its inputs and g the
mean squares of the gradients of its outputs: the Fisher matrix as KFAC factors it (Martens and
Grosse 2015), of the outputs' factor the diagonal. One pass forward and backward over some text
gives both for all layers.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qexport.errors import InputError
from qexport.grid import Scheme
from qexport.quantization.activations import STAGES, importance
from qexport.quantization.fit import fit

__all__ = ["Losses", "measure", "too_wide", "widths_for"]

Losses = dict[str, dict[str, float]]  # by layer and width


def measure(
    model: Any,
    windows: Tensor,
    layers: Mapping[str, Sequence[tuple[str, Scheme]]],
    tell: Callable[[str], None],
) -> Losses:
    """The divergence of `model` (float32), for every width that a layer may have.

    windows   tokens [n, length]

    Beside the model it takes float32 [in, in] for every set of layers with the same inputs. The
    model's parameters no longer ask for gradients afterwards.
    """
    model.requires_grad_(False)  # gradients of activations are all that is wanted
    model.enable_input_require_grads()
    inputs: dict[str, Tensor] = {}
    slopes: dict[str, Tensor] = {}
    hooks = list(_watch(model, layers, inputs, slopes))
    for number, window in enumerate(windows):
        tokens = window.unsqueeze(0).to(model.device)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        tell(f"sensitivity: window {number + 1}/{len(windows)}")
    for hook in hooks:
        hook.remove()
    count = windows.numel()
    found: Losses = {}
    for name, choices in layers.items():
        weight = model.get_submodule(name).weight.detach()
        hessian = inputs[_seen_by(name)]
        matters = importance(hessian)
        found[name] = {}
        for bits, scheme in choices:
            best = fit(weight, scheme, matters, coarse=True)
            lost = best.codes(weight, scheme).dequantize() - weight
            rows = ((lost @ hessian) * lost).sum(-1)
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
        size, device, seen = layer.in_features, layer.weight.device, _seen_by(name)
        slopes[name] = torch.zeros(layer.out_features, device=device)

        def see(_: nn.Module, given: tuple[Tensor, ...], seen: str = seen) -> None:
            rows = given[0].detach().flatten(0, -2).float()
            inputs[seen].addmm_(rows.T, rows)

        def feel(_: nn.Module, __: Any, given: tuple[Tensor, ...], name: str = name) -> None:
            slopes[name].add_(given[0].flatten(0, -2).float().square().sum(0))

        if seen not in inputs:
            inputs[seen] = torch.zeros(size, size, device=device)
            yield layer.register_forward_pre_hook(see)
        yield layer.register_full_backward_hook(feel)


def _seen_by(name: str) -> str:
    """The first of the layers of a block that have the same inputs as this one."""
    stage = next(stage for stage in STAGES if name.endswith(stage))
    return name.removesuffix(next(end for end in stage if name.endswith(end))) + stage[0]


def too_wide(target: float, least: float) -> InputError:
    """The error where even the narrowest widths are more bits per weight."""
    return InputError(
        f"--target-bpw {target:g} is not to be had: the narrowest widths come to {least:.3f}, "
        "scales counted; give more, or larger groups."
    )


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
        """Wider steps that there is room for, the one of most gain for its bits being the least."""
        now = at[group]
        for step in range(now + 1, len(widths[group])):
            gain, more = loss(group, now) - loss(group, step), cost(group, step) - cost(group, now)
            if gain > 0 and used + more <= target * total:
                yield -gain / more, group, step

    used = sum(cost(group, 0) for group in range(len(groups)))
    if used > target * total:
        raise too_wide(target, used / total)
    queue = [min(found) for group in range(len(groups)) if (found := list(offers(group)))]
    heapq.heapify(queue)
    while queue:
        _, group, step = heapq.heappop(queue)
        more = cost(group, step) - cost(group, at[group])
        if used + more <= target * total:  # there may be less room than when it was offered
            used += more
            at[group] = step
        if found := list(offers(group)):
            heapq.heappush(queue, min(found))
    return {name: widths[i][at[i]] for i, names in enumerate(groups) for name in names}


def _narrow_first(choices: Mapping[str, float], sizes: Mapping[str, float]) -> list[str]:
    return sorted(choices, key=lambda bits: sizes[bits])
