"""The dense checkpoint that training and quantization start from, and what it must be for that."""

from pathlib import Path

import torch
from torch import nn

from qexport.checkpoint import Checkpoint, open_source
from qexport.errors import CheckpointError, InputError

__all__ = ["check_names", "dense_source", "stored_dtype"]


def dense_source(folder: Path) -> Checkpoint:
    """Raises InputError for a checkpoint that is quantized."""
    source = open_source(folder)
    if source is None or source.layout != "dense":
        raise InputError(f"{folder} is quantized already; start from a dense checkpoint.")
    return source


def stored_dtype(source: Checkpoint) -> torch.dtype:
    """The dtype in which unquantized parameters will be stored."""
    name = source.config.get("dtype") or source.config.get("torch_dtype") or "float32"
    stored = getattr(torch, str(name), torch.float32)
    if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
        raise CheckpointError(f"{source.folder}/config.json: dtype {name!r} is no float dtype.")
    return stored


def check_names(source: Checkpoint, plan: nn.Module) -> None:
    """Raise CheckpointError unless the RUN would have exactly the source's tensors."""
    mine = {name for name, _ in plan.named_parameters()}  # of those that are tied, the first
    lacking = sorted(mine - set(source))
    if lacking:
        raise CheckpointError(f"{source.folder} lacks {lacking[0]}; the checkpoint is not whole.")
    odd = sorted(set(source) - mine - {"lm_head.weight"})
    if odd:
        raise CheckpointError(
            f"{source.folder}: transformers renames or drops {odd[0]} of this architecture, so "
            "that a run of it could not be written back; it is not supported yet."
        )
