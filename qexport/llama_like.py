"""Families that transformers lacks, and that are a Llama with something more.

MiniCPM (Hu et al. 2024) multiplies embeddings, what every block adds, and logits; MobileLLM (Liu et
al. 2024) runs every block twice. Both come as hooks on transformers' Llama: names of tensors, and
their gradients, stay what they are.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qexport.errors import CheckpointError, UnsupportedError

__all__ = ["LLAMA_LIKE", "extend", "minicpm_scales"]

LLAMA_LIKE = ("minicpm", "minicpm4", "mobilellm")  # values of model_type


def extend(model: Any, config: Mapping[str, Any]) -> None:
    """Make a Llama the family that its config.json names. Raises CheckpointError."""
    family = config.get("model_type")
    if family in ("minicpm", "minicpm4"):
        _scale(model, config)
    if family == "mobilellm" and config.get("layer_sharing"):
        model.config.use_cache = False
        for block in model.model.layers:
            block.register_forward_hook(_again, with_kwargs=True)


def minicpm_scales(config: Mapping[str, Any], layers: int) -> tuple[float, float | None, float]:
    """MiniCPM's factors of embeddings, of what a block adds (None: as it is), and of logits.

    Raises CheckpointError for a config in which they are no numbers.
    """
    try:
        base, depth = config.get("dim_model_base"), config.get("scale_depth")
        return (
            float(config.get("scale_emb", 1.0)),
            None if depth is None else float(depth) / math.sqrt(layers),
            float(base) / float(config["hidden_size"]) if base else 1.0,
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json's MiniCPM scales make no sense ({error}).") from error


def _scale(model: Any, config: Mapping[str, Any]) -> None:
    embeddings, factor, logits = minicpm_scales(config, len(model.model.layers))
    model.model.embed_tokens.register_forward_hook(_times(embeddings))
    if factor is not None:
        for block in model.model.layers:
            block.self_attn.o_proj.register_forward_hook(_times(factor))
            block.mlp.down_proj.register_forward_hook(_times(factor))
    model.lm_head.register_forward_hook(_times(logits))


def _times(factor: float) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * factor

    return hook


def _again(block: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
    """The same block on what it has made."""
    if options.get("past_key_values") is not None:
        raise UnsupportedError(
            "a shared layer has one place in transformers' cache, and wants two."
        )
    return block.forward(output, *inputs[1:], **options)
