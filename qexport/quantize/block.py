"""One decoder block, from dense to quantized: what a method does, in which order."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qexport.blocks import Blocks, Stream
from qexport.errors import QexportError
from qexport.grid import Scheme
from qexport.quantize.activations import STAGES, Seen, look, output_error
from qexport.quantize.awq import awq_factors
from qexport.quantize.config import METHODS, QuantizeConfig
from qexport.quantize.equalize import fold, tie
from qexport.quantize.gptq import Inputs, gptq
from qexport.quantize.rounding import Rounding, nearest
from qexport.quantize.signround import learn
from qexport.quantize.smooth import smooth_factors
from qexport.tensor import QuantizedTensor

__all__ = ["Activations", "Result", "quantize_block"]


@dataclass(frozen=True)
class Activations:
    """Streams of the calibration text.

    inputs    of the block, as the blocks before it make them
    targets   what the dense block makes of dense inputs; None where nothing is learned from them
    rows      batches of windows
    """

    inputs: Stream
    targets: Stream | None
    rows: Sequence[slice]
    precision: str


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
    blocks: Blocks,
    index: int,
    block: nn.Module,
    schemes: Mapping[str, Scheme],
    stored: torch.dtype,
    text: Activations | None,
) -> Result:
    """Quantize the layers of `block` that have `schemes`; it has their values afterwards.

    Dense parameters that change are rounded to `stored`. Raises QexportError for inputs that are
    not finite, or that say too little.
    """
    method = METHODS[config.method]
    changed: list[str] = []
    if method.scaling != "none":
        assert text is not None
        changed = _equalize(config, blocks, index, block, schemes, stored, text)
    roundings, report = _round(config, blocks, index, block, schemes, text)
    if method.learned:
        assert text is not None
        assert text.targets is not None
        how = (text.inputs, text.targets, text.rows, text.precision, config.signround, config.seed)
        roundings, before, after = learn(blocks, index, block, roundings, *how)
        report["block"] = {"error": after, "error_before": before}
    parameters = dict(block.named_parameters())
    return Result(
        {name: rounding.tensor() for name, rounding in roundings.items()},
        {name: parameters[name].detach().to(stored) for name in changed},
        report,
    )


def _equalize(
    config: QuantizeConfig,
    blocks: Blocks,
    index: int,
    block: nn.Module,
    schemes: Mapping[str, Scheme],
    stored: torch.dtype,
    text: Activations,
) -> list[str]:
    """Fold factors into the dense block; returns parameters that have changed."""
    names = [stage[0] for stage in STAGES]
    seen = look(blocks, index, block, names, text.inputs, text.rows, text.precision)
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
    blocks: Blocks,
    index: int,
    block: nn.Module,
    schemes: Mapping[str, Scheme],
    text: Activations | None,
) -> tuple[dict[str, Rounding], dict[str, dict[str, Any]]]:
    """Layer by layer; each sees what the ones before it have become, if that is asked for."""
    found: dict[str, Rounding] = {}
    report: dict[str, dict[str, Any]] = {}
    seen: dict[str, Seen] = {}
    prefix = blocks.name(index)
    for stage in STAGES:
        mine = [name for name in stage if name in schemes]
        if not mine:
            continue
        if text is not None and stage[0] not in seen:
            wanted = [stage[0]] if config.true_sequential else [names[0] for names in STAGES]
            seen = look(blocks, index, block, wanted, text.inputs, text.rows, text.precision)
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
