"""Folders that no format packed: what training and quantization start from and end with.

A dense Hugging Face checkpoint, a RUN of ours, or a checkpoint of ParetoQ's own training.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from qexport.checkpoint import Checkpoint, dense_entry, read_config
from qexport.errors import CheckpointError, InputError
from qexport.model_sizes import check_sizes
from qexport.run_tensors import code_entries, latent_entries
from qexport.shards import ShardReader
from qexport.upstream import is_upstream, upstream_entries

__all__ = ["as_stored", "check_names", "dense_source", "open_source", "rounded", "stored_dtype"]


def open_source(folder: Path) -> Checkpoint | None:
    """Open a dense checkpoint, a RUN or an upstream ParetoQ checkpoint; None if it is packed."""
    config = read_config(folder)
    quantization = config.get("quantization_config")
    if quantization is not None:
        if not isinstance(quantization, dict):
            raise CheckpointError(f"{folder}/config.json: quantization_config is not an object.")
        form = quantization.get("format")
        if quantization.get("quant_method") != "qexport" or form not in ("latent", "codes"):
            return None
        entries = latent_entries if form == "latent" else code_entries
        return Checkpoint(folder, "run", config, entries(ShardReader(folder), quantization))
    reader = ShardReader(folder)
    if is_upstream(reader):
        return Checkpoint(folder, "paretoq", config, upstream_entries(reader, config))
    return Checkpoint(folder, "dense", config, {n: dense_entry(reader, n) for n in reader})


def dense_source(folder: Path) -> Checkpoint:
    """Raises InputError for a checkpoint that is quantized, CheckpointError as `check_sizes`."""
    source = open_source(folder)
    if source is None or source.layout != "dense":
        raise InputError(f"{folder} is quantized already; start from a dense checkpoint.")
    check_sizes(source.config)
    return source


def stored_dtype(source: Checkpoint) -> torch.dtype:
    """The dtype in which unquantized parameters will be stored."""
    name = source.config.get("dtype") or source.config.get("torch_dtype") or "float32"
    stored = getattr(torch, str(name), torch.float32)
    if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
        raise CheckpointError(f"{source.folder}/config.json: dtype {name!r} is no float dtype.")
    return stored


def as_stored(name: str, value: Tensor, stored: torch.dtype) -> Tensor:
    """A dense tensor in the dtype that it will be stored in.

    Raises CheckpointError where that has no room for it.
    """
    made = value.to(stored)
    if stored != value.dtype and not torch.equal(made.isfinite(), value.isfinite()):
        raise CheckpointError(
            f"{name} has values beyond the range of {stored}, which config.json asks for; change "
            "its dtype there.".replace("torch.", "")
        )
    return made


def rounded(source: Checkpoint, stored: torch.dtype) -> str | None:
    """In words, that tensors of the source are wider than what they will be stored in."""
    wider = {
        e.dtype for e in source.entries.values() if torch.promote_types(e.dtype, stored) != stored
    }
    if not wider:
        return None
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in wider))
    return (
        f"the model is in {names} and its config.json says {stored}: what is not quantized is "
        "rounded to that"
    ).replace("torch.", "")


def check_names(source: Checkpoint, plan: nn.Module) -> None:
    """Raise CheckpointError unless the RUN would have exactly the source's tensors."""
    mine = {name for name, _ in plan.named_parameters()}  # of those that are tied, the first
    lacking = sorted(mine - set(source))
    if lacking:
        raise CheckpointError(
            f"{source.folder} has no {lacking[0]}: it is not whole, or transformers has other "
            "names for tensors of this architecture, which is not supported yet."
        )
    for name, parameter in plan.named_parameters():
        if tuple(parameter.shape) != source.entries[name].shape:
            raise CheckpointError(
                f"{source.folder}: {name} is {list(source.entries[name].shape)}, and its config "
                f"wants {list(parameter.shape)}."
            )
    odd = sorted(set(source) - mine - {"lm_head.weight"})
    if odd:
        raise CheckpointError(
            f"{source.folder}: {odd[0]} is no tensor of this architecture in transformers, so "
            "that a run with it could not be written back; remove it, or it is not supported yet."
        )
