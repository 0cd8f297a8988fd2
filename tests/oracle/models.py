"""SmolLM2 rounded to a grid: real weights for real engines."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.demo import fetch
from qexport.checkpoint import Checkpoint, Entry
from qexport.formats import open_checkpoint
from qexport.grid import GRIDS, INT8, Scheme
from qexport.paretoq import effective_scale, initial_alpha
from qexport.shards import ShardWriter
from qexport.tensor import QuantizedTensor, portable, quantize

__all__ = ["dense_twin", "rounded", "smollm2"]


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a dense bfloat16 checkpoint."""
    return fetch()


def rounded(folder: Path, grid: str, group_size: int | None) -> Checkpoint:
    """A dense checkpoint with its linear layers rounded to nearest on a grid, when read."""
    source = open_checkpoint(folder)
    scheme = Scheme(GRIDS[grid], group_size)
    entries = {
        name: Entry(entry.shape, torch.float16, partial(_round, source, name, scheme), scheme)
        if name.endswith("_proj.weight")
        else entry
        for name, entry in source.entries.items()
    }
    return Checkpoint(folder, "run", source.config, entries)


def _round(source: Checkpoint, name: str, scheme: Scheme) -> QuantizedTensor:
    weight = source.dense(name).float()
    if scheme.grid == INT8:
        groups = weight.view(weight.shape[0], scheme.groups(weight.shape[1]), -1)
        scale = portable(groups.abs().amax(-1) / 127)
    else:
        scale = effective_scale(initial_alpha(weight, scheme, "mse"), scheme)
    return quantize(weight, scale, scheme)


def dense_twin(source: Checkpoint, folder: Path) -> Path:
    """The dequantized weights as an ordinary bfloat16 checkpoint."""
    folder.mkdir()
    writer = ShardWriter(folder)
    for name in source:
        tensor = source[name]
        value: Tensor = (
            tensor.dequantize(torch.bfloat16) if isinstance(tensor, QuantizedTensor) else tensor
        )
        writer.add(name, value)
    writer.close()
    source.copy_files(folder)
    from qexport.output import write_json

    write_json(folder / "config.json", source.config)
    return folder
