"""What the decoder must know of a model, read from its config.json.

A family is a row of `_FAMILIES`: the transformers config class that checks its fields, and what
it does that a Llama does not. A model that asks for anything else is left to transformers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qexport.errors import CheckpointError, InputError
from qexport.llama_like import LLAMA_LIKE, minicpm_scales
from qexport.model_sizes import check_sizes
from qexport.modelling import UNTRUSTED

__all__ = ["DecoderConfig", "Rope", "decoder_config"]


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies: angle = position * inverse_frequency, times `factor` after cos and sin.

    short, long   float32 [rotary_dim / 2]; longrope takes `long` for sequences over `original`
    """

    short: Tensor
    long: Tensor
    original: int
    factor: float

    def reusable(self, held: int, shared: int, length: int) -> int:
        """How many of `shared` cached keys a prompt of `length` may keep; see Decoder.reusable.

        0 where some of them may have been turned by the other table.
        """
        return 0 if self.original and max(held, length) > self.original else shared


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a Llama-like decoder.

    attention_scale   of q·k, usually head_dim**-0.5
    embedding_scale   multiplies embeddings; residual_scale what every block adds; logit_scale
                      logits (MiniCPM's scale_emb, scale_depth/sqrt(layers), 1/(hidden/base))
    windows           sliding attention of each layer, 0 for none; rotated: whether it has rope
    weights           which layer's weights layer i uses (MobileLLM shares neighbours)
    """

    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    eps: float
    rope: Rope
    tied: bool
    windows: tuple[int, ...]
    rotated: tuple[bool, ...]
    weights: tuple[int, ...]
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def layers(self) -> int:
        return len(self.weights)

    @property
    def attention_scale(self) -> float:
        return float(self.head_dim**-0.5)


# model_type: the transformers model whose config has the same fields
_FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    **dict.fromkeys(LLAMA_LIKE, "llama"),
}
_ROPES = ("default", "linear", "llama3", "yarn", "longrope")


def decoder_config(config: dict[str, Any]) -> DecoderConfig | str:
    """The decoder's view of a config.json, or the reason why this decoder is not for it.

    Raises InputError or CheckpointError for a config of a known family that makes no sense.
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
        return f"{family!r} is no family of this decoder"
    check_sizes(config, whole=True)
    checked = _checked(config, _FAMILIES[family])
    if getattr(checked, "hidden_act", "silu") != "silu":
        return f"its activation is {checked.hidden_act}, not silu"
    rope = _rope(checked)
    if isinstance(rope, str):
        return rope
    layers = int(checked.num_hidden_layers)
    weights = tuple(range(layers))
    if family == "mobilellm" and config.get("layer_sharing"):
        weights = tuple(layer for layer in weights for _ in range(2))
    head_dim = int(getattr(checked, "head_dim", None) or checked.hidden_size // _heads(checked))
    found = DecoderConfig(
        hidden=checked.hidden_size,
        inter=checked.intermediate_size,
        heads=_heads(checked),
        kv_heads=getattr(checked, "num_key_value_heads", None) or _heads(checked),
        head_dim=head_dim,
        vocabulary=checked.vocab_size,
        context=checked.max_position_embeddings,
        eps=checked.rms_norm_eps,
        rope=rope,
        tied=bool(config.get("share_embedding", checked.tie_word_embeddings)),
        windows=tuple(_window(checked, layer) for layer in weights),
        rotated=tuple(_rotated(checked, layer) for layer in weights),
        weights=weights,
        **(_minicpm(config, layers) if family.startswith("minicpm") else {}),
    )
    _check(found)
    return found


def _checked(config: dict[str, Any], model_type: str) -> Any:
    from transformers import AutoConfig

    fields = {key: value for key, value in config.items() if key not in UNTRUSTED}
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # config classes check their fields with errors of their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"config.json makes no {model_type} model ({first}).") from error


def _heads(checked: Any) -> int:
    return int(checked.num_attention_heads)


def _rope(checked: Any) -> Rope | str:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = dict(checked.rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPES:
        return f"its positions are of kind {kind!r}"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "only part of a head is rotated"
    try:
        if kind == "default":
            dim = getattr(checked, "head_dim", None) or checked.hidden_size // _heads(checked)
            powers = torch.arange(0, dim, 2, dtype=torch.float) / dim
            frequencies = 1.0 / (float(parameters["rope_theta"]) ** powers)
            return Rope(frequencies, frequencies, 0, 1.0)
        short, factor = ROPE_INIT_FUNCTIONS[kind](checked)
        if kind != "longrope":
            return Rope(short.float(), short.float(), 0, float(factor))
        original = int(parameters["original_max_position_embeddings"])
        long, _ = ROPE_INIT_FUNCTIONS[kind](checked, seq_len=original + 1)
        return Rope(short.float(), long.float(), original, float(factor))
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json's rope parameters make no sense ({error}).") from error


def _own(checked: Any, name: str) -> Any:
    """A field that a family's config has, or None: transformers keeps others and ignores them."""
    return getattr(checked, name, None) if hasattr(type(checked)(), name) else None


def _window(checked: Any, layer: int) -> int:
    kinds = _own(checked, "layer_types")
    window = _own(checked, "sliding_window") or 0
    if kinds is not None:
        return int(window) if kinds[layer] == "sliding_attention" else 0
    return int(window)


def _rotated(checked: Any, layer: int) -> bool:
    without = _own(checked, "no_rope_layers")  # 1 where there is rope, for all its name
    return bool(without[layer]) if without else True


def _minicpm(config: dict[str, Any], layers: int) -> dict[str, float]:
    embedding, residual, logit = minicpm_scales(config, layers)
    return {
        "embedding_scale": embedding,
        "residual_scale": 1.0 if residual is None else residual,
        "logit_scale": logit,
    }


def _check(found: DecoderConfig) -> None:
    if found.heads % found.kv_heads:
        raise CheckpointError(
            f"config.json has {found.heads} heads and {found.kv_heads} key-value heads, which do "
            "not divide them."
        )
    if found.head_dim < 1 or found.head_dim % 2:
        raise CheckpointError(f"config.json has heads of {found.head_dim}, no even size.")
