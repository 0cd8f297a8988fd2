"""Checkpoints in memory, to be packed by tests."""

import json
from pathlib import Path
from typing import Any

import torch

from qexport.checkpoint import Checkpoint, Entry
from qexport.grid import GRIDS, Scheme
from qexport.tensor import QuantizedTensor, portable

Tensors = dict[str, QuantizedTensor | torch.Tensor]


def tensor(grid: str, out: int, inputs: int, group: int | None, seed: int = 0) -> QuantizedTensor:
    """Random codes, portable scales and zero points."""
    generator = torch.Generator().manual_seed(seed)
    scheme = Scheme(GRIDS[grid], group)
    groups = scheme.groups(inputs)
    levels = scheme.grid.levels
    codes = torch.randint(0, levels, (out, inputs), generator=generator).to(torch.uint8)
    scales = portable(torch.rand(out, groups, generator=generator) + 0.01).half()
    zeros = None
    if scheme.grid.zeros:
        # from 1: version 1 of GPTQ has no zero point of 0
        zeros = torch.randint(1, levels, (out, groups), generator=generator).to(torch.uint8)
    minima = torch.rand(out, groups, generator=generator) if scheme.grid.minima else None
    return QuantizedTensor(codes, scales, scheme, zeros, minima)


def taken_by(form: str) -> tuple[str, int | None]:
    """A grid and a group that a format takes: what ours are, where it does."""
    own = {"int-quantized": ("int8", None), "bitsandbytes": ("nf4", 64)}
    return own.get(form, ("seq2", 32))


def checkpoint(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Checkpoint:
    """A checkpoint of given tensors, as a source to pack."""
    entries = {
        name: Entry(
            tuple(t.shape),
            torch.float16 if isinstance(t, QuantizedTensor) else t.dtype,
            lambda t=t: t,  # type: ignore[misc]
            t.scheme if isinstance(t, QuantizedTensor) else None,
        )
        for name, t in tensors.items()
    }
    return Checkpoint(folder, "test", config or {"model_type": "llama"}, entries)


def decoder_layer(model: Path, grid: str, inputs: int, group: int | None) -> Checkpoint:
    """One whole Llama layer of width `inputs`, quantized, in a folder with a tokenizer.

    `model` is the tiny model: its tokenizer is used, and its tokens' number.
    """
    config = {
        **json.loads((model / "config.json").read_text()),
        "num_hidden_layers": 1,
        "hidden_size": inputs,
        "intermediate_size": inputs,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": inputs // 4,
    }
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randint(-9, 9, (260, inputs), generator=generator) / 64
    tensors: Tensors = {"model.embed_tokens.weight": embedding.bfloat16()}
    layer = "model.layers.0"
    names = ["self_attn." + name for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    names += ["mlp." + name for name in ("gate_proj", "up_proj", "down_proj")]
    for seed, name in enumerate(names):
        tensors[f"{layer}.{name}.weight"] = tensor(grid, inputs, inputs, group, seed)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{layer}.{name}.weight"] = torch.randn(inputs).bfloat16()
    tensors["model.norm.weight"] = torch.randn(inputs).bfloat16()
    return checkpoint(model, tensors, config)
