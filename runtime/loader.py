"""A checkpoint of any layout as a transformers model that computes with its exact values.

This is the reference runtime: quantized weights are dequantized once, by the same function that
training used, and transformers' own modelling multiplies with them. It is as fast and as large as
the dense model; its worth is that every other kernel is measured against it.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from qexport.checkpoint import Checkpoint
from qexport.errors import CheckpointError, InputError
from qexport.formats import open_checkpoint
from qexport.tensor import QuantizedTensor

__all__ = ["best_device", "load_model", "load_tokenizer", "open_model", "resolve_dtype"]


def best_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """`auto` is the checkpoint's own dtype; otherwise float32, bfloat16 or float16."""
    if dtype == "auto":
        dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return known.get(dtype, torch.float32)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformers causal language model in eval mode, its weights those of `checkpoint`.

    Raises CheckpointError where config and tensors do not make a whole model, InputError for an
    architecture that transformers does not know.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = _config(checkpoint)
    state = {}
    for name in checkpoint:
        tensor = checkpoint[name]
        if isinstance(tensor, QuantizedTensor):
            state[name] = tensor.dequantize(dtype)
        else:
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    try:
        model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except (ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{checkpoint.folder}: its tensors do not fit its config ({reason})."
        ) from error
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing or mismatched:
        wrong = (missing or [str(m) for m in mismatched])[0]
        raise CheckpointError(f"{checkpoint.folder} lacks {wrong}; the checkpoint is not whole.")
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a checkpoint. Raises CheckpointError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} has no tokenizer that transformers can load.") from error


def open_model(folder: Path, dtype: str = "auto") -> tuple[Any, Any, Checkpoint]:
    """(model, tokenizer, checkpoint) of a folder, on the best device of this machine."""
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    model = load_model(checkpoint, resolve_dtype(checkpoint, dtype), best_device())
    return model, tokenizer, checkpoint


def _config(checkpoint: Checkpoint) -> Any:
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{checkpoint.folder}/config.json names no model_type.")
    fields = {k: v for k, v in checkpoint.config.items() if k not in ("model_type", "auto_map")}
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{checkpoint.folder}: transformers here does not know model type {model_type!r} "
            f"({reason}); code that comes with a checkpoint is never run."
        ) from error
