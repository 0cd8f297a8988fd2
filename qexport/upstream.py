"""Checkpoints of facebookresearch/ParetoQ: latent weights, `weight_clip_val`, and `w_bits`."""

import math
from functools import partial
from typing import Any

import torch

from qexport.checkpoint import Entry, dense_entry, matrix_shape, module_of
from qexport.errors import CheckpointError
from qexport.grid import Scheme
from qexport.paretoq import WIDTHS, from_upstream, upstream_scale
from qexport.shards import ShardReader
from qexport.tensor import QuantizedTensor, portable

__all__ = ["is_upstream", "upstream_entries"]

_CLIP = ".weight_clip_val"


def is_upstream(reader: ShardReader) -> bool:
    """Whether files are of ParetoQ's own training."""
    return any(name.endswith(_CLIP) for name in reader)


def upstream_entries(reader: ShardReader, config: dict[str, Any]) -> dict[str, Entry]:
    """As its training computed them. Raises CheckpointError for a width that it has not."""
    width = config.get("w_bits")
    bits = "1.58" if width == 0 else str(width)
    if bits not in WIDTHS:
        raise CheckpointError(
            f"{reader.folder} has weight_clip_val tensors but w_bits {config.get('w_bits')!r} in "
            "config.json; ParetoQ's are 0 (1.58 bits), 1, 2, 3 and 4."
        )
    entries = {}
    for name in reader:
        clip = module_of(name) + _CLIP
        if name.endswith(".weight") and clip in reader:
            shape = matrix_shape(reader, name)
            scheme = _scheme(reader, clip, shape, bits)
            load = partial(_load, reader, module_of(name), scheme)
            size = _bytes(reader, name) + _bytes(reader, clip)
            entries[name] = Entry(shape, reader.dtype(name), load, scheme, size)
        elif not name.endswith(_CLIP):
            entries[name] = dense_entry(reader, name)
    return entries


def _scheme(reader: ShardReader, clip: str, shape: tuple[int, int], bits: str) -> Scheme:
    out, *groups = reader.shape(clip) or (0,)
    count = groups[0] if groups else 1
    if out != shape[0] or count == 0 or shape[1] % count or groups[1:] not in ([], [1]):
        raise CheckpointError(f"{reader.folder}: {clip} has shape {reader.shape(clip)}.")
    group_size = None if count == 1 else shape[1] // count
    for name in (clip, clip.removesuffix(_CLIP) + ".weight"):
        if reader.dtype(name) not in (torch.float16, torch.bfloat16, torch.float32):
            raise CheckpointError(f"{reader.folder}: {name} has dtype {reader.dtype(name)}.")
    scale = upstream_scale(reader.tensor(clip), WIDTHS[bits])
    is_portable = torch.equal(portable(scale.float()), scale.float())
    dtype = torch.float16 if is_portable else scale.dtype
    return Scheme(WIDTHS[bits].grid, group_size, dtype)


def _bytes(reader: ShardReader, name: str) -> int:
    return math.prod(reader.shape(name)) * reader.dtype(name).itemsize


def _load(reader: ShardReader, module: str, scheme: Scheme) -> QuantizedTensor:
    weight = reader.tensor(f"{module}.weight")
    clip = reader.tensor(module + _CLIP)
    for tensor, name in ((weight, "weight"), (clip, "weight_clip_val")):
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{reader.folder}: {module}.{name} holds a NaN or an infinity; its training "
                "diverged."
            )
    return from_upstream(weight, clip.reshape(clip.shape[0], -1), scheme)
