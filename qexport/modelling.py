"""From a checkpoint to a transformers model, by its tensors and config alone.

Nothing else of a folder is trusted: no code that it brings (`auto_map`), no attention kernel that
it names, no tensor that it lacks and transformers would fill with random numbers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

from qexport.checkpoint import Checkpoint
from qexport.errors import CheckpointError, InputError, first_line
from qexport.experts import take_apart
from qexport.llama_like import LLAMA_LIKE, extend

__all__ = ["UNTRUSTED", "allocate", "build_model", "load_tokenizer", "meta_model"]

# fields of a config.json that transformers is not given: they name code to run, or are ours to set
UNTRUSTED = ("model_type", "auto_map", "attn_implementation", "_attn_implementation")


def build_model(checkpoint: Checkpoint, dtype: torch.dtype, read: Callable[[str], Tensor]) -> Any:
    """A causal language model in `dtype` whose parameters are `read(name)` for each name.

    Raises CheckpointError where config and tensors do not make a whole model, InputError for an
    architecture that transformers does not know.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = _config(checkpoint)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{checkpoint.folder}: {config.model_type} is no causal language model.")
    state = {name: read(name) for name in checkpoint}
    try:
        model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: its tensors do not fit its config ({first_line(error)})."
        ) from error
    lacking = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if lacking:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {lacking[0]}; the checkpoint is not whole."
        )
    extend(model, checkpoint.config)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = _generation_config(checkpoint.folder)
    return model


def meta_model(checkpoint: Checkpoint) -> Any:
    """The checkpoint's model without its weights, its experts taken apart.

    Raises InputError as `build_model` does.
    """
    config = _config(checkpoint)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{checkpoint.folder}: {config.model_type} is no causal language model.")
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    extend(model, checkpoint.config)
    take_apart(model)
    return model


def allocate(model: Any, module: nn.Module, device: torch.device) -> None:
    """Memory for the parameters of a part of a `meta_model`, which are to be read into it.

    Buffers that no checkpoint has, as a scale of embeddings, are made as the family makes them.
    """
    module.to_empty(device=device)
    for part in module.modules():
        if next(part.buffers(recurse=False), None) is not None:
            model._init_weights(part)


def _generation_config(folder: Path) -> Any:
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises whatever a damaged file made it trip over
        raise CheckpointError(
            f"{folder}/generation_config.json is damaged ({first_line(error)})."
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a checkpoint. Raises CheckpointError where there is none."""
    transformers_logging.set_verbosity_error()  # of families that it does not know it warns
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a damaged file made it trip over
        if folder.is_dir() and not [*folder.glob("*token*"), *folder.glob("vocab*")]:
            raise CheckpointError(
                f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it "
                "from the model that it was made of."
            ) from error
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load ({first_line(error)})."
        ) from error


def _config(checkpoint: Checkpoint) -> Any:
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{checkpoint.folder}/config.json names no model_type.")
    tied = {}
    if model_type in LLAMA_LIKE:
        found = checkpoint.config.get("tie_word_embeddings", False)
        tied = {"tie_word_embeddings": bool(checkpoint.config.get("share_embedding", found))}
        model_type = "llama"
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{checkpoint.folder}: transformers here does not know model type {model_type[:60]!r}; "
            "code that comes with a checkpoint is never run."
        )
    fields = {key: v for key, v in checkpoint.config.items() if key not in UNTRUSTED}
    try:
        return AutoConfig.for_model(model_type, **{**fields, **tied})
    except Exception as error:  # config classes check their fields with errors of their own
        raise InputError(
            f"{checkpoint.folder}: transformers makes no {model_type!r} model of its config "
            f"({first_line(error)})."
        ) from error
