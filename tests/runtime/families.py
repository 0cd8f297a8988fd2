"""Tiny random models of every family that the decoder knows, as transformers makes them."""

from pathlib import Path
from typing import Any

import torch
import transformers

from qexport.checkpoint import Checkpoint, Entry
from qexport.formats import open_checkpoint
from qexport.tiny import write_tiny_model

__all__ = ["FAMILIES", "make", "minicpm"]

_SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 48,
}
# name: transformers' class, and what differs from the shape above
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "smollm": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": _LLAMA3}),
    "yarn": ("Llama", {"rope_parameters": _YARN}),
    "longrope": ("Llama", {"rope_parameters": _LONG}),
    "linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "wide-heads": ("Llama", {"head_dim": 40, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "mistral-window": ("Mistral", {"head_dim": 16, "sliding_window": 20}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1, 0], "tie_word_embeddings": True}),
}


def make(folder: Path, name: str) -> Checkpoint:
    """A model of this family with norms and biases that are not their ones and zeros."""
    kind, extra = FAMILIES[name]
    write_tiny_model(folder)
    config = getattr(transformers, f"{kind}Config")(**{**_SHAPE, **extra})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(4)  # attention that tells positions apart
    model.float().save_pretrained(folder)
    return open_checkpoint(folder)


def minicpm(source: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """A MiniCPM on a Llama's weights, and the Llama whose weights have its scales folded in.

    transformers has no MiniCPM: it is a Llama that multiplies embeddings, what each block adds,
    and logits (Hu et al. 2024).
    """
    scales = {"scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 24}
    config = {**source.config, **scales, "model_type": "minicpm"}
    depth = 1.4 / source.config["num_hidden_layers"] ** 0.5

    def folded(name: str) -> torch.Tensor:
        factor = {"model.embed_tokens.weight": 3.0, "lm_head.weight": 24 / 96}.get(name, 1.0)
        if "o_proj" in name or "down_proj" in name:
            factor = depth
        return source.dense(name) * factor

    entries = {
        name: Entry(entry.shape, entry.dtype, lambda name=name: folded(name))  # type: ignore[misc]
        for name, entry in source.entries.items()
    }
    return (
        Checkpoint(source.folder, "dense", config, dict(source.entries)),
        Checkpoint(source.folder, "dense", source.config, entries),
    )
