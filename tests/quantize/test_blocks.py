"""A chain of single blocks is the model that transformers makes of a checkpoint, to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qexport.blocks import Blocks
from qexport.errors import CheckpointError
from qexport.source import dense_source

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.5},  # nothing is dropped out
    "seed_oss": {},
    "gemma2": {},  # embeddings are scaled by a buffer that no checkpoint has
    "gemma3_text": {},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    "olmo": {},  # norms without weights
    "cohere": {},
    "smollm3": {},
    "exaone4": {},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_blocks_one_by_one_are_the_model(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, __, made: outputs.append(made[0] if isinstance(made, tuple) else made)
        )
    tokens = torch.randint(3, 260, (2, 40))
    logits = model(input_ids=tokens, use_cache=False).logits
    blocks = Blocks(dense_source(tmp_path), torch.float32, CPU)
    hidden = blocks.embed(tokens)
    blocks.forget_embeddings()
    for index in range(len(blocks)):
        block = blocks.make(index)
        if index == len(blocks) - 1:
            assert torch.equal(blocks.logits(block, hidden), logits)
        hidden = blocks.run(index, block, hidden)
        assert torch.equal(hidden, outputs[index]), index
        blocks.release(index)


@torch.no_grad()
def test_what_is_quantized_is_read_in_all_its_bits(tiny_model: Path) -> None:
    """A checkpoint may be wider than its config says that it is."""
    source = dense_source(tiny_model)
    name = "model.layers.0.mlp.up_proj"
    wide = torch.randn(source.entries[f"{name}.weight"].shape)
    source.entries[f"{name}.weight"] = replace(source.entries[f"{name}.weight"], load=lambda: wide)
    for quantized, expected in (([name], wide), ([], wide.bfloat16().float())):
        blocks = Blocks(source, torch.bfloat16, CPU, quantized.__contains__)
        weight = blocks.make(0).get_parameter("mlp.up_proj.weight")
        assert torch.equal(weight, expected)


def test_what_its_dtype_does_not_hold_is_refused(tiny_model: Path) -> None:
    source = dense_source(tiny_model)
    name = "model.layers.0.input_layernorm.weight"
    large = torch.full(source.entries[name].shape, 1e5)
    source.entries[name] = replace(source.entries[name], load=lambda: large)
    with pytest.raises(CheckpointError, match=f"{name} has values beyond the range of float16"):
        Blocks(source, torch.float16, CPU).make(0)
