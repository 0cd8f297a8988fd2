"""One decoder block, from dense to quantized: what a method does, in which order."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qexport.blocks import Stream
from qexport.errors import QexportError
from qexport.grid import Scheme
from qexport.quantize.activations import STAGES, Passage, Seen, output_error
from qexport.quantize.awq import awq_factors
from qexport.quantize.config import METHODS, QuantizeConfig
from qexport.quantize.equalize import fold, tie
from qexport.quantize.gptq import Inputs, gptq
from qexport.quantize.rounding import Rounding, nearest
from qexport.quantize.signround import learn
from qexport.quantize.smooth import smooth_factors
from qexport.tensor import QuantizedTensor

__all__ = ["Result", "quantize_block"]


@dataclass(frozen=True)
class Result:
    """What has become of a block; names are short: `mlp.up_proj`.

    layers   of those that are quantized
    dense    other parameters that have changed
    report   of each layer, and of the block where something was learned
    """

    layers: dict[str, QuantizedTensor]
    dense: dict[str, Tensor]
    report: dict[str, dict[str, Any]]


def quantize_block(
    config: QuantizeConfig,
    name: str,
    block: nn.Module,
    schemes: Mapping[str, Scheme],
    stored: torch.dtype,
    passage: Passage | None,
    targets: Stream | None,
) -> Result:
    """Quantize the layers of `block` that have `schemes`; it has their values afterwards.

    name      of the block, with a dot at its end
    passage   of the calibration text, where there is some
    targets   what the dense block makes of dense inputs, where something is learned from that

    Dense parameters that change are rounded to `stored`. Raises QexportError for inputs that are
    not finite, or that say too little.
    """
    method = METHODS[config.method]
    changed: list[str] = []
    if method.scaling != "none":
        assert passage is not None
        changed = _equalize(config, block, schemes, stored, passage)
    roundings, report = _round(config, name, block, schemes, passage)
    if method.learned:
        assert passage is not None
        assert targets is not None
        passage.forget()
        roundings, before, after = learn(passage, roundings, targets, config.signround, config.seed)
        report["block"] = {"error": after, "error_before": before}
    parameters = dict(block.named_parameters())
    return Result(
        {layer: rounding.tensor() for layer, rounding in roundings.items()},
        {layer: parameters[layer].detach().to(stored) for layer in changed},
        report,
    )


def _equalize(
    config: QuantizeConfig,
    block: nn.Module,
    schemes: Mapping[str, Scheme],
    stored: torch.dtype,
    passage: Passage,
) -> list[str]:
    """Fold factors into the dense block; returns parameters that have changed."""
    seen = passage.look([stage[0] for stage in STAGES])
    changed: list[str] = []
    for stage in STAGES:
        tied = tie(block, stage[0])
        before_is_kept = stage[0] == "self_attn.o_proj" and "self_attn.v_proj" not in schemes
        before_is_kept |= stage[0] == "mlp.down_proj" and "mlp.up_proj" not in schemes
        if tied is None or before_is_kept or any(name not in schemes for name in stage):
            continue
        layers: list[Any] = [block.get_submodule(name) for name in stage]
        weights = [layer.weight.detach() for layer in layers]
        if METHODS[config.method].scaling == "smooth":
            factors = smooth_factors(weights, seen[stage[0]], tied, config.smooth)
        else:
            factors = awq_factors(weights, [schemes[name] for name in stage], seen[stage[0]], tied)
        changed += fold(block, stage[0], stage, factors, stored)
    return changed


def _round(
    config: QuantizeConfig,
    prefix: str,
    block: nn.Module,
    schemes: Mapping[str, Scheme],
    passage: Passage | None,
) -> tuple[dict[str, Rounding], dict[str, dict[str, Any]]]:
    """Layer by layer; each sees what the ones before it have become, if that is asked for."""
    found: dict[str, Rounding] = {}
    report: dict[str, dict[str, Any]] = {}
    seen: dict[str, Seen] = {}
    for stage in STAGES:
        mine = [name for name in stage if name in schemes]
        if not mine:
            continue
        if passage is not None and config.true_sequential:
            seen = passage.look([stage[0]], settled=True)
        elif passage is not None and not seen:
            seen = passage.look([names[0] for names in STAGES])
        by_gptq = [name for name in mine if config.rounding_of(prefix + name) == "gptq"]
        inputs = _inputs(config, prefix + stage[0], seen[stage[0]]) if by_gptq else None
        for name in mine:
            layer: Any = block.get_submodule(name)
            weight = layer.weight.detach().clone()
            if not bool(weight.isfinite().all()):
                raise QexportError(f"{prefix}{name} holds a NaN or an infinity.")
            own = inputs if name in by_gptq else None
            found[name], report[name] = _rounded(
                config, weight, schemes[name], seen.get(stage[0]), own
            )
            layer.weight.data.copy_(found[name].tensor().dequantize())
    return found, report


def _inputs(config: QuantizeConfig, name: str, seen: Seen) -> Inputs:
    """What GPTQ works with."""
    try:
        return Inputs.of(seen.hessian, config.gptq)
    except QexportError as error:
        raise QexportError(f"{name}: {error}") from error


def _rounded(
    config: QuantizeConfig,
    weight: Tensor,
    scheme: Scheme,
    seen: Seen | None,
    inputs: Inputs | None,
) -> tuple[Rounding, dict[str, Any]]:
    """A layer, and the relative errors of its output: its own, and what RTN would have made."""
    start = time.monotonic()
    simple = nearest(weight, scheme, seen, per_tensor=config.per_tensor)
    found = simple
    if inputs is not None:
        tied = scheme.super_block is not None and scheme.scale_dtype == torch.float32
        fixed = config.per_tensor or tied  # scales that are not refitted one by one
        options = replace(config.gptq, refits=0) if fixed else config.gptq
        found = gptq(weight, inputs, simple.fit, scheme, options)
    hessian = torch.eye(weight.shape[1], device=weight.device) if seen is None else seen.hessian
    return found, {
        "scheme": scheme.label,
        "error": output_error(weight, found.tensor().dequantize(), hessian),
        "rtn_error": output_error(weight, simple.tensor().dequantize(), hessian),
        "seconds": round(time.monotonic() - start, 3),
    }
