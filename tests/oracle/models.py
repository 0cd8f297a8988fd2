"""SmolLM2 on a grid: real weights for real engines.

Two engines differ in the last bit of every sum, and a model that was rounded without training
amplifies that to another text altogether. A short training takes it away, and is what one packs.
"""

from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.demo import fetch
from qexport.checkpoint import Checkpoint, Entry
from qexport.formats import open_checkpoint
from qexport.grid import GRIDS, Scheme
from qexport.output import write_json
from qexport.tensor import QuantizedTensor, portable, quantize
from qexport.training import TrainConfig, train
from tests.shard_writer import ShardWriter

__all__ = ["dense_twin", "rounded", "smollm2", "trained"]


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a dense bfloat16 checkpoint."""
    return fetch()


def trained(run: Path, bits: str, steps: int, max_length: int = 256) -> Checkpoint:
    """SmolLM2 after a few steps of training at a width, in groups of 64.

    At a rate that leaves it the model that it was (perplexity 17.2 at 4 bits, 17.6 dense): what has
    unlearned its answers finds many words as likely, and those fall as the last bits do.
    """
    settings = TrainConfig(
        smollm2(),
        "builtin",
        run,
        bits,
        64,
        max_steps=steps,
        max_length=max_length,
        batch_size=1,
        lr=1e-4,
        compile=False,
    )
    train(settings, Console(quiet=True))
    return open_checkpoint(run)


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
    groups = weight.view(weight.shape[0], scheme.groups(weight.shape[1]), -1)
    middle = scheme.grid.middle
    return quantize(weight, portable(groups.abs().amax(-1) / (middle - 1)), scheme)


def dense_twin(source: Checkpoint, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The dequantized weights as an ordinary checkpoint; what is not quantized stays as it is."""
    folder.mkdir()
    writer = ShardWriter(folder)
    for name in source:
        tensor = source[name]
        value: Tensor = tensor.dequantize(dtype) if isinstance(tensor, QuantizedTensor) else tensor
        writer.add(name, value)
    writer.close()
    source.copy_files(folder)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    write_json(folder / "config.json", config)
    return folder
