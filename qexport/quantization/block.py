"""One decoder block, from dense to quantized: what a method does, in which order."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qexport.blocks import Stream
from qexport.errors import QexportError
from qexport.experts import expert_of
from qexport.grid import Scheme
from qexport.quantization.activations import STAGES, Passage, Seen, output_error, stages
from qexport.quantization.awq import awq_factors
from qexport.quantization.config import METHODS, QuantizeConfig
from qexport.quantization.equalize import fold, tie
from qexport.quantization.gptq import Inputs, gptq
from qexport.quantization.rounding import Rounding, nearest
from qexport.quantization.signround import learn
from qexport.quantization.smooth import smooth_factors
from qexport.tensor import QuantizedTensor

__all__ = ["Result", "quantize_block"]

_FEW = 0.005  # of the tokens
_FOLDED = 1e-3  # of what a block adds


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

    Dense parameters that change are rounded to `stored`. Raises QexportError for weights or inputs
    that are not finite, and for inputs that say too little.
    """
    for layer in schemes:
        weight: Any = block.get_submodule(layer).weight
        if not bool(weight.isfinite().all()):
            raise QexportError(f"{name}{layer} holds a NaN or an infinity.")
    method = METHODS[config.method]
    changed: list[str] = []
    plain: dict[str, float] = {}
    if method.scaling != "none":
        assert passage is not None
        changed, plain = _equalize(config, name, block, schemes, stored, passage)
    roundings, report = _round(config, name, block, schemes, passage)
    for layer, error in plain.items():
        report[layer]["rtn_error"] = error
    if method.learned and roundings:
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
    prefix: str,
    block: nn.Module,
    schemes: Mapping[str, Scheme],
    stored: torch.dtype,
    passage: Passage,
) -> tuple[list[str], dict[str, float]]:
    """Fold factors into the dense block.

    Returns parameters that have changed, and what rounding would have lost of each layer without
    them. Raises QexportError for an architecture whose blocks are then not what they were.
    """
    whole = [stage for stage in STAGES if all(name in schemes for name in stage)]
    if not whole:
        return [], {}
    seen = passage.look([stage[0] for stage in whole])
    before = passage.added()
    changed: list[str] = []
    plain: dict[str, float] = {}
    for stage in whole:
        tied = tie(block, stage[0])
        before_is_kept = stage[0] == "self_attn.o_proj" and "self_attn.v_proj" not in schemes
        before_is_kept |= stage[0] == "mlp.down_proj" and "mlp.up_proj" not in schemes
        if tied is None or before_is_kept:
            continue
        layers: list[Any] = [block.get_submodule(name) for name in stage]
        weights = [layer.weight.detach() for layer in layers]
        for name, weight in zip(stage, weights, strict=True):
            own = seen[stage[0]]
            made = nearest(weight, schemes[name], own, per_tensor=config.per_tensor).tensor()
            plain[name] = output_error(weight, made.dequantize(), own.hessian)
        if METHODS[config.method].scaling == "smooth":
            factors = smooth_factors(weights, seen[stage[0]], tied, config.smooth)
        else:
            factors = awq_factors(weights, [schemes[name] for name in stage], seen[stage[0]], tied)
        changed += fold(block, stage[0], stage, factors, stored)
    lost = float((passage.added() - before).norm() / before.norm().clamp(min=1e-30))
    if not lost < _FOLDED:
        raise QexportError(
            f"{prefix.removesuffix('.')}: --method {config.method} has no way to scale the inputs "
            "of this architecture without changing what it computes; use gptq or signround."
        )
    with torch.no_grad():  # a bias that was divided: the layers to come see what will be kept
        for name in changed:
            parameter = block.get_parameter(name)
            parameter.copy_(parameter.to(stored).float())
    return changed, plain


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
    wanted = [[g for g in each if any(n in schemes for n in g)] for each in stages(schemes)]
    order = [groups for groups in wanted if groups]
    for stage in order:
        if passage is not None and config.true_sequential:
            seen = passage.look([group[0] for group in stage], settled=True)
        elif passage is not None and not seen:
            seen = passage.look([group[0] for each in order for group in each])
        for group in stage:
            mine = [name for name in group if name in schemes]
            own = _enough(config, prefix, group[0], seen.get(group[0]))
            by_gptq = [name for name in mine if config.rounding_of(prefix + name) == "gptq"]
            inputs = _inputs(config, prefix + group[0], own) if by_gptq and own else None
            for name in mine:
                layer: Any = block.get_submodule(name)
                weight = layer.weight.detach().clone()
                how = inputs if name in by_gptq else None
                found[name], report[name] = _rounded(config, weight, schemes[name], own, how)
                if not math.isfinite(report[name]["error"]):
                    raise QexportError(
                        f"{prefix}{name} holds weights that are too large to be squared."
                    )
                if expert_of(name) is not None and group[0] in seen:
                    report[name] |= {"tokens": seen[group[0]].tokens, "enough": own is not None}
                layer.weight.data.copy_(found[name].tensor().dequantize())
    return found, report


def _enough(config: QuantizeConfig, prefix: str, layer: str, seen: Seen | None) -> Seen | None:
    """What a layer has seen, or None where that is too little to go by: of a hardly used expert.

    Raises QexportError where that is asked for.
    """
    if seen is None or expert_of(layer) is None or seen.share >= _FEW:
        return seen
    if config.unseen_experts == "error":
        raise QexportError(
            f"{prefix}{expert_of(layer)} saw {seen.tokens} tokens, {seen.share:.2%} of the text; "
            "give more of it, or --unseen-experts nearest."
        )
    return None


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
        k_quant = scheme.super_block is not None and scheme.scale_dtype == torch.float32
        fixed = config.per_tensor or k_quant  # scales that are not refitted one by one
        options = replace(config.gptq, refits=0) if fixed else config.gptq
        found = gptq(weight, inputs, simple.fit, scheme, options)
    hessian = torch.eye(weight.shape[1], device=weight.device) if seen is None else seen.hessian
    return found, {
        "scheme": scheme.label,
        "error": output_error(weight, found.tensor().dequantize(), hessian),
        "rtn_error": output_error(weight, simple.tensor().dequantize(), hessian),
        "seconds": round(time.monotonic() - start, 3),
    }
