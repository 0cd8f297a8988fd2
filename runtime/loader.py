"""A checkpoint of any layout as a transformers model that computes with its exact values.

This is the reference runtime: quantized weights are dequantized once, by the same function that
training used, and transformers' own modelling multiplies with them. It is as fast and as large as
the dense model; its worth is that everything else is measured against it.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint
from qexport.formats import open_checkpoint
from qexport.model_sizes import check_sizes
from qexport.modelling import build_model, load_tokenizer
from qexport.tensor import QuantizedTensor

__all__ = [
    "best_device",
    "load_model",
    "open_model",
    "open_tokenizer",
    "read_tensor",
    "resolve_dtype",
]


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
    """A model in eval mode on `device`; raises what `qexport.modelling.build_model` raises."""
    return build_model(checkpoint, dtype, partial(read_tensor, checkpoint, dtype)).to(device).eval()


def open_model(folder: Path, dtype: str = "auto") -> tuple[Any, Any, Checkpoint]:
    """(model, tokenizer, checkpoint) of a folder, on the best device of this machine."""
    checkpoint = open_checkpoint(folder)
    check_sizes(checkpoint.config)
    tokenizer = open_tokenizer(checkpoint)
    model = load_model(checkpoint, resolve_dtype(checkpoint, dtype), best_device())
    return model, tokenizer, checkpoint


def open_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint. Raises CheckpointError where there is none."""
    return (checkpoint.make_tokenizer or partial(load_tokenizer, checkpoint.folder))()


def read_tensor(checkpoint: Checkpoint, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor as transformers takes it: dequantized, in `dtype` if it is floating point."""
    tensor = checkpoint[name]
    if isinstance(tensor, QuantizedTensor):
        return tensor.dequantize(dtype)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
