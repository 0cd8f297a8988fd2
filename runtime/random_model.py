"""A checkpoint of a model's sizes with random weights, that is nowhere on disk.

Speed and memory do not depend on what the numbers are, so that a model can be timed before it is
fetched, and with fewer layers than it has.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint, Entry
from qexport.grid import Scheme
from qexport.runtime.families import DecoderConfig
from qexport.tensor import QuantizedTensor

__all__ = ["random_model"]

_SCALE = 2.0**-6
_BLOCK = 1 << 20


def random_model(config: dict[str, Any], sizes: DecoderConfig, scheme: Scheme | None) -> Checkpoint:
    """Linear layers by `scheme`, or bfloat16 for None; matrices of one shape have the same codes.

    config   of config.json; sizes: what `decoder_config` makes of it, its layers those wanted
    """
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    hidden, inter = sizes.hidden, sizes.inter
    shapes = {
        **{"self_attn.q_proj": (queries, hidden), "self_attn.o_proj": (hidden, queries)},
        **{"self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden)},
        **{"mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden)},
        "mlp.down_proj": (hidden, inter),
    }
    made: dict[tuple[int, int], QuantizedTensor] = {}

    def weight(shape: tuple[int, int]) -> Tensor | QuantizedTensor:
        if scheme is None:
            return _dense(shape)
        if shape not in made:
            made[shape] = _quantized(shape, scheme)
        return made[shape]

    entries = {}
    for layer in sorted(set(sizes.weights)):
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            entry = Entry(shape, torch.float16, partial(weight, shape), scheme)
            entries[f"{prefix}{name}.weight"] = entry
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = Entry((hidden,), torch.float32, partial(_dense, (hidden,)))
            entries[f"{prefix}{name}.weight"] = norm
    table = (sizes.vocabulary, hidden)
    rest: dict[str, tuple[int, ...]] = {"model.embed_tokens": table, "model.norm": (hidden,)}
    if not sizes.tied:
        rest["lm_head"] = table
    for name, shape_of in rest.items():
        entry = Entry(shape_of, torch.bfloat16, partial(_dense, shape_of))
        entries[f"{name}.weight"] = entry
    return Checkpoint(Path("random"), "run", config, entries)


def _dense(shape: tuple[int, ...]) -> Tensor:
    """Its own memory every time, as in a model; a million random numbers, again and again."""
    if len(shape) == 1:
        return torch.ones(shape)
    count = math.prod(shape)
    block = (torch.randn(min(count, _BLOCK)) * _SCALE).bfloat16()
    return block.repeat(-(-count // len(block)))[:count].view(shape)


def _quantized(shape: tuple[int, int], scheme: Scheme) -> QuantizedTensor:
    groups = (shape[0], scheme.groups(shape[1]))
    codes = torch.randint(0, scheme.grid.levels, shape, dtype=torch.uint8)
    scales = torch.full(groups, _SCALE, dtype=scheme.scale_dtype)
    zeros = None
    if scheme.grid.zeros:
        zeros = torch.full(groups, scheme.grid.levels // 2, dtype=torch.uint8)
    return QuantizedTensor(codes, scales, scheme, zeros)
