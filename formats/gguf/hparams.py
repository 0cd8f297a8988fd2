"""Hyper-parameters: config.json as GGUF metadata, and back."""

import math
from typing import Any

import torch
from torch import Tensor

from qexport.errors import CheckpointError, RefusedError
from qexport.formats.gguf.container import GgufFile, Value
from qexport.formats.gguf.names import FAMILIES, Family, Rows
from qexport.llama_like import minicpm_scales

__all__ = ["ROPE_TENSORS", "config_of", "family_of", "hparams", "rope_tensors", "rows_of"]

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_PLAIN_ROPE = {"rope_type", "rope_theta"}
_LENGTH = "original_max_position_embeddings"
_ROPE_KEYS = {
    "default": {*_PLAIN_ROPE, "factor"},
    "linear": {*_PLAIN_ROPE, "factor"},
    "yarn": {*_PLAIN_ROPE, "factor", _LENGTH},
    "llama3": {*_PLAIN_ROPE, "factor", "low_freq_factor", "high_freq_factor", _LENGTH},
    "longrope": {
        *_PLAIN_ROPE,
        "factor",
        "long_factor",
        "short_factor",
        "attention_factor",
        _LENGTH,
    },
}


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises RefusedError for one that GGUF is not written for."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise RefusedError(
            f"gguf is written for the families {', '.join(FAMILIES)}, and this is "
            f"{config.get('model_type')!r}; native holds it."
        )
    return family


def rows_of(config: dict[str, Any]) -> Rows:
    """How q and k of a config's family are ordered in a file."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or not family.permuted:
        return Rows()
    heads = _whole(config, "num_attention_heads")
    return Rows(heads, _whole(config, "num_key_value_heads", heads))


def hparams(config: dict[str, Any]) -> dict[str, Value]:
    """The metadata that llama.cpp builds a model from. Raises RefusedError for what it lacks."""
    arch = family_of(config).arch
    _check_known(config)
    heads, hidden = _whole(config, "num_attention_heads"), _whole(config, "hidden_size")
    head_dim = _head_dim(config)
    values = {
        "context_length": Value("u32", _context(config)),
        "embedding_length": Value("u32", hidden),
        "block_count": Value("u32", _whole(config, "num_hidden_layers")),
        "feed_forward_length": Value("u32", _whole(config, "intermediate_size")),
        "attention.head_count": Value("u32", heads),
        "attention.head_count_kv": Value("u32", _whole(config, "num_key_value_heads", heads)),
        "attention.layer_norm_rms_epsilon": Value("f32", _number(config, "rms_norm_eps")),
        "attention.key_length": Value("u32", head_dim),
        "attention.value_length": Value("u32", head_dim),
        "rope.dimension_count": Value("u32", head_dim),
        "rope.freq_base": Value("f32", _finite("rope_theta", _rope(config)["rope_theta"])),
        "vocab_size": Value("u32", _whole(config, "vocab_size")),
        **_rope_scaling(config),
    }
    if arch == "minicpm":
        layers = _whole(config, "num_hidden_layers")
        embeddings, residual, logits = minicpm_scales(config, layers)
        values["embedding_scale"] = Value("f32", embeddings)
        values["residual_scale"] = Value("f32", 1.0 if residual is None else residual)
        values["logit_scale"] = Value("f32", 1 / logits)
    return {f"{arch}.{key}": value for key, value in values.items()}


def _check_known(config: dict[str, Any]) -> None:
    """Refuse what changes a model's values and llama.cpp does not compute for these families."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise RefusedError(f"llama.cpp computes silu here, and this model has {activation!r}.")
    if config.get("use_sliding_window"):
        raise RefusedError("llama.cpp has no sliding window here; native holds the model.")
    rope = _rope(config)
    given = {key for key, value in rope.items() if value is not None}
    unknown = given - _ROPE_KEYS[rope["rope_type"]] if rope["rope_type"] in _ROPE_KEYS else set()
    if unknown:
        raise RefusedError(f"gguf does not say the rotary parameter {min(unknown)}; native does.")


def _context(config: dict[str, Any]) -> int:
    """Positions; Mistral's window ends them, since llama.cpp has none there."""
    longest = _whole(config, "max_position_embeddings")
    if config.get("model_type") == "mistral" and config.get("sliding_window") is not None:
        return min(longest, _whole(config, "sliding_window"))
    return longest


def rope_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of factors that scale rotary frequencies, by their names in GGUF."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(config, rope)}
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": _factors(config, rope.get(f"{length}_factor"))
            for length in ("long", "short")
        }
    return {}


def _factors(config: dict[str, Any], values: Any) -> Tensor:
    count = _head_dim(config) // 2
    if not isinstance(values, list) or len(values) != count:
        raise CheckpointError(f"config.json wants {count} rotary factors of either length.")
    return torch.tensor([_finite("a rotary factor", value) for value in values])


def _head_dim(config: dict[str, Any]) -> int:
    heads, hidden = _whole(config, "num_attention_heads"), _whole(config, "hidden_size")
    return _whole(config, "head_dim", hidden // heads)


def config_of(file: GgufFile) -> dict[str, Any]:
    """A config.json for a file of llama.cpp's. Raises CheckpointError for one not known here."""
    arch = file.text("general.architecture")
    family = next((f for f in FAMILIES.values() if f.arch == arch), None)
    known = sorted({f.arch for f in FAMILIES.values()})
    if family is None:
        raise CheckpointError(
            f"{file.path} is of the architecture {arch[:60]!r}; {', '.join(known)} are read."
        )
    heads = _size(file, f"{arch}.attention.head_count")
    hidden = _size(file, f"{arch}.embedding_length")
    layers = _size(file, f"{arch}.block_count")
    config: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": _size(file, f"{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _size(file, f"{arch}.attention.head_count_kv", heads),
        "head_dim": _size(file, f"{arch}.attention.key_length", hidden // heads),
        "max_position_embeddings": _size(file, f"{arch}.context_length"),
        "rms_norm_eps": file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "vocab_size": _vocab_size(file, arch),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_of(file, arch),
        "dtype": "float32",
    }
    if family.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    if arch == "minicpm":
        config["scale_emb"] = file.number("minicpm.embedding_scale")
        config["scale_depth"] = file.number("minicpm.residual_scale") * math.sqrt(layers)
        scale = file.number("minicpm.logit_scale")
        if not scale > 0:
            raise file.damaged(f"minicpm.logit_scale is {scale}")
        config["dim_model_base"] = hidden / scale
    for token in ("bos", "eos"):
        key = f"tokenizer.ggml.{token}_token_id"
        if key in file:
            config[f"{token}_token_id"] = file.integer(key)
    _check_factors(file, config)
    return config


def _vocab_size(file: GgufFile, arch: str) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise file.damaged("it has no token_embd.weight")
    return _size(file, f"{arch}.vocab_size", embedding.shape[0])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters from either place that transformers has kept them in."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json has the rotary parameters {found!r}.")
    rope = dict(found)
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    kind = rope.pop("type", None)
    rope["rope_type"] = str(rope.get("rope_type") or kind or "default")
    return rope


def _rope_scaling(config: dict[str, Any]) -> dict[str, Value]:
    rope = _rope(config)
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):
        return {}
    if kind in ("linear", "yarn"):
        values = {
            "rope.scaling.type": Value("str", kind),
            "rope.scaling.factor": Value("f32", _finite("factor", rope.get("factor"))),
        }
        if kind == "yarn":
            values["rope.scaling.original_context_length"] = _original_length(config, rope)
        return values
    if kind == "longrope":
        return {
            "rope.scaling.original_context_length": _original_length(config, rope),
            "rope.scaling.attn_factor": Value("f32", _attention_factor(config, rope)),
        }
    raise RefusedError(f"gguf has no rotary scaling of type {kind!r}; native holds the model.")


def _attention_factor(config: dict[str, Any], rope: dict[str, Any]) -> float:
    """What longrope multiplies sines and cosines by (transformers, `rope_type: longrope`)."""
    if rope.get("attention_factor") is not None:
        return _finite("attention_factor", rope["attention_factor"])
    original = int(_original_length(config, rope).value)
    factor = rope.get("factor") or _whole(config, "max_position_embeddings") / original
    if _finite("factor", factor) <= 1 or original < 2:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


def _original_length(config: dict[str, Any], rope: dict[str, Any]) -> Value:
    known = {**config, **{k: v for k, v in rope.items() if v is not None}}
    return Value("u32", _whole(known, _LENGTH, _whole(config, "max_position_embeddings")))


def _rope_of(file: GgufFile, arch: str) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_theta": file.number(f"{arch}.rope.freq_base", 10000.0),
        "rope_type": file.text(f"{arch}.rope.scaling.type", "default"),
    }
    if rope["rope_type"] in ("none", "default"):
        rope["rope_type"] = "default"
        return rope
    if rope["rope_type"] not in ("linear", "yarn"):
        raise CheckpointError(f"{file.path}: rotary scaling {rope['rope_type']!r} is not read.")
    rope["factor"] = file.number(f"{arch}.rope.scaling.factor", 1.0)
    key = f"{arch}.rope.scaling.original_context_length"
    if key in file:
        rope[_LENGTH] = file.integer(key)
    return rope


def _check_factors(file: GgufFile, config: dict[str, Any]) -> None:
    """Recognise Llama 3's rotary factors; refuse others, which config.json would have to say."""
    present = [name for name in ROPE_TENSORS if name in file.tensors]
    if not present:
        return
    if present == ["rope_freqs.weight"] and file.tensors[present[0]].type == 0:
        count = math.prod(file.tensors[present[0]].shape)
        found = torch.from_numpy(file.data(present[0], count * 4).view("<f4").copy())
        rope = {
            **config["rope_parameters"],
            "rope_type": "llama3",
            "factor": float(found.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            _LENGTH: 8192,
        }
        if count == config["head_dim"] // 2 and torch.allclose(
            found, _llama3_factors(config, rope), rtol=1e-5
        ):
            config["rope_parameters"] = rope
            return
    raise CheckpointError(
        f"{file.path} has rotary factors that its metadata does not explain; put the model's "
        "config.json beside it, alone in a folder."
    )


def _llama3_factors(config: dict[str, Any], rope: dict[str, Any]) -> Tensor:
    """What Llama 3.1 divides each rotary frequency by (transformers, `rope_type: llama3`)."""
    dim = _head_dim(config)
    theta, factor = (_finite(key, rope.get(key)) for key in ("rope_theta", "factor"))
    low, high = (_finite(key, rope.get(key)) for key in ("low_freq_factor", "high_freq_factor"))
    original = _whole(rope, _LENGTH)
    if not 0 < low < high or factor <= 0 or theta <= 0:
        raise CheckpointError(f"config.json has the rotary parameters {rope!r}.")
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    turns = original * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _whole(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(f"config.json has {key} {value!r}, and a whole number is wanted.")
    return value


def _number(config: dict[str, Any], key: str) -> float:
    return _finite(key, config.get(key))


def _finite(key: str, value: Any) -> float:
    """A number that a float32 holds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 3e38:
        raise CheckpointError(f"config.json has {key} {value!r}, and a number is wanted.")
    return float(value)


def _size(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.integer(key, default)
    if not 0 < value < 2**31:
        raise file.damaged(f"{key} is {value}")
    return value
