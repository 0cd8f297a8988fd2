"""The block-wise start alone: what comes of it is made a RUN with one block in memory at a time."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint
from qexport.train.block import Blocks, held_out_loss, trained_blocks
from qexport.train.config import TrainConfig
from qexport.train.prepare import run_tensors
from qexport.train.run_folder import BLOCKS
from qexport.train.text import IGNORED, Windows

__all__ = ["block_results", "block_tensors"]


def block_tensors(
    config: TrainConfig, source: Checkpoint, stored: torch.dtype, run: Path, names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the RUN: those of every block, and the source's for all else in `names`."""
    blocks = Blocks(source, stored, torch.device("cpu"))
    for index, block in trained_blocks(blocks, run / BLOCKS, config.scheme_of, stored):
        for name, value in run_tensors(block, stored):
            yield blocks.name(index) + name, value
    for name in names:
        if not name.startswith("model.layers."):
            yield name, source.dense(name).to(stored)


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
        labels = held_out.tokens.long()
        if held_out.targets is not None:
            labels = labels.masked_fill(~held_out.targets, IGNORED)
        loss = held_out_loss(
            Blocks(source, stored, device),
            run / BLOCKS,
            config.scheme_of,
            stored,
            held_out.tokens,
            labels,
            config.batch_size,
        )
        results |= {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        results["eval_tokens"] = held_out.tokens.numel()
    return results
