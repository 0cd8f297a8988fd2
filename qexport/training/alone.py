"""The block-wise start alone: what comes of it is made a RUN with one block in memory at a time."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qexport.blocks import Blocks, Stream
from qexport.checkpoint import Checkpoint
from qexport.run_folder import BLOCKS, held_out_results
from qexport.source import as_stored
from qexport.training.block import prepared_block
from qexport.training.config import TrainConfig
from qexport.training.held_out import batches, summed_loss
from qexport.training.prepare import run_tensors
from qexport.training.text import Windows

__all__ = ["block_results", "block_tensors"]


def block_tensors(
    config: TrainConfig, source: Checkpoint, stored: torch.dtype, run: Path, names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the RUN: those of every block, and the source's for all else in `names`."""
    blocks = Blocks(source, stored, torch.device("cpu"))
    for index, block in _trained_blocks(config, blocks, run / BLOCKS, stored):
        for name, value in run_tensors(block, stored):
            yield blocks.name(index) + name, value
    for name in names:
        if not name.startswith("model.layers."):
            yield name, as_stored(name, source.dense(name), stored)


def _trained_blocks(
    config: TrainConfig, blocks: Blocks, folder: Path, stored: torch.dtype
) -> Iterator[tuple[int, nn.Module]]:
    """Blocks as they were trained, one at a time; their scales are read, so that any will do."""
    for index in range(len(blocks)):
        block = prepared_block(
            blocks,
            index,
            config.scheme_of,
            "paper",
            stored,
            config.settings.gradient,
            fused=False,
            trained=folder,
        )
        yield index, block
        blocks.release(index)


@torch.no_grad()
def _held_out_loss(
    config: TrainConfig, blocks: Blocks, folder: Path, stored: torch.dtype, windows: Windows
) -> tuple[float, int]:
    """As `held_out_loss`, of trained blocks."""
    tokens = windows.tokens
    every = batches(windows, config.batch_size)
    shape = (*tokens.shape, blocks.width)
    path = folder / "held-out.bin"
    hidden = Stream(path, shape, torch.float32)
    for rows in every:
        hidden.write(rows, blocks.embed(tokens[rows]))
    blocks.forget_embeddings()
    total = torch.zeros(2, dtype=torch.float64)
    for index, block in _trained_blocks(config, blocks, folder, stored):
        device = next(block.parameters()).device
        with parametrize.cached():  # quantized once
            for rows in every:
                given = hidden.read(rows, device)
                if index < len(blocks) - 1:
                    hidden.write(rows, blocks.run(index, block, given))
                    continue
                total += summed_loss(blocks.logits(block, given), windows.labels(rows)).cpu()
    path.unlink()
    loss, targets = total.tolist()
    return loss / max(targets, 1), int(targets)


def block_results(
    config: TrainConfig,
    source: Checkpoint,
    stored: torch.dtype,
    run: Path,
    held_out: Windows | None,
) -> dict[str, Any]:
    """As after training end to end, with none of its steps."""
    results: dict[str, Any] = {"steps": 0, "tokens": 0}
    results |= dict.fromkeys(("train_loss", "final_loss", "train_runtime"))
    if held_out is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        blocks = Blocks(source, stored, device)
        loss, targets = _held_out_loss(config, blocks, run / BLOCKS, stored, held_out)
        results |= held_out_results(loss, targets)
    return results
