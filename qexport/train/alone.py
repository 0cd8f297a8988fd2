"""The block-wise start alone: what comes of it is made a RUN with one block in memory at a time."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexport.checkpoint import Checkpoint
from qexport.train.block import block_parameters, named, parts
from qexport.train.config import TrainConfig
from qexport.train.layers import Blocks, Stream
from qexport.train.prepare import Choose, prepare, run_tensors
from qexport.train.run_folder import BLOCKS
from qexport.train.text import IGNORED, Windows

__all__ = ["block_results", "block_tensors"]


def block_tensors(
    config: TrainConfig, source: Checkpoint, stored: torch.dtype, run: Path, names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the RUN: those of every block, and the source's for all else in `names`."""
    blocks = Blocks(source, stored, torch.device("cpu"))
    for index, block in _trained_blocks(blocks, run / BLOCKS, config.scheme_of, stored):
        for name, value in run_tensors(block, stored):
            yield blocks.name(index) + name, value
    for name in names:
        if not name.startswith("model.layers."):
            yield name, source.dense(name).to(stored)


def _trained_blocks(
    blocks: Blocks, folder: Path, choose: Choose, stored: torch.dtype
) -> Iterator[tuple[int, nn.Module]]:
    """Blocks as they were trained, prepared, one at a time."""
    for index in range(len(blocks)):
        block, prefix = blocks.make(index), blocks.name(index)
        prepare(block, partial(named, choose, prefix), "paper", stored)
        found = block_parameters(folder, index).items()
        block.load_state_dict({name.removeprefix(prefix): value for name, value in found})
        yield index, block
        blocks.release(index)


@torch.no_grad()
def _held_out_loss(
    blocks: Blocks,
    folder: Path,
    choose: Choose,
    stored: torch.dtype,
    inputs: Tensor,
    labels: Tensor,
    batch_size: int,
) -> float:
    """Mean cross-entropy of trained blocks on windows [n, length]; labels of -100 do not count."""
    shape = (len(inputs), inputs.shape[1], blocks.embed(inputs[:1, :1]).shape[-1])
    path = folder / "held-out.bin"
    hidden = Stream(path, shape, torch.float32)
    for rows in parts(len(inputs), batch_size):
        hidden.write(rows, blocks.embed(inputs[rows]))
    blocks.forget_embeddings()
    total, count = 0.0, 0
    for index, block in _trained_blocks(blocks, folder, choose, stored):
        device = next(block.parameters()).device
        for rows in parts(len(inputs), batch_size):
            given = hidden.read(rows, device)
            if index < len(blocks) - 1:
                hidden.write(rows, blocks.run(index, block, given))
                continue
            logits = blocks.logits(block, given)[:, :-1].flatten(0, 1).float()
            wanted = labels[rows, 1:].flatten().to(device)
            total += float(nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            count += int((wanted != -100).sum())
    path.unlink()
    return total / max(count, 1)


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
        loss = _held_out_loss(
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
