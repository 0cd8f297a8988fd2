"""The block-wise start: every decoder block is trained to do what its dense self does.

Two streams of activations run through the model, one block after the other: the dense model's, and
that of the blocks quantized so far. A block sees the second and is trained against what the dense
block makes of the first, so that it mends what those before it have lost (EfficientQAT, Chen et al.
2024, Block-AP). One block, and the two streams on the disk, are all that is held at a time.

Streams and finished blocks stand in a folder; a run that was killed goes on with the block that it
was in.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qexport.blocks import Blocks, Stream, lost_share, relative_errors
from qexport.errors import QexportError
from qexport.layers import Choose
from qexport.output import write_json
from qexport.paretoq import Gradient, effective_scale, initial_alpha
from qexport.quantization.activations import STAGES, Passage, importance
from qexport.quantization.fit import Fit
from qexport.quantization.gptq import Inputs, compensate
from qexport.run_folder import DONE
from qexport.training.prepare import FakeQuantize, prepare

__all__ = [
    "BlockSettings",
    "load_blocks",
    "parts",
    "prepared_block",
    "train_blocks",
]

_STREAM = torch.bfloat16
_KINDS = "dense", "quantized"


@dataclass(frozen=True)
class BlockSettings:
    """How a block is trained.

    epochs           passes over the windows; batch_size windows in a step
    compensated      windows by whose activations weights are rounded first, by GPTQ; 0 for none
    lr, scale_lr     peak rates of weights and of scales; they fall to nothing along a cosine
    """

    epochs: int
    compensated: int
    batch_size: int
    lr: float
    scale_lr: float
    gradient: Gradient
    fused: bool
    precision: str
    seed: int


def train_blocks(
    blocks: Blocks,
    windows: Tensor,
    choose: Choose,
    scale_init: Literal["paper", "mse"],
    stored: torch.dtype,
    settings: BlockSettings,
    folder: Path,
    tell: Callable[[int, float, float], None],
) -> None:
    """Train every block on windows [n, length] and keep its parameters in `folder`.

    `tell` is given a block's number, and the relative error of its output before and after. Blocks
    that `folder` has already are left as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = _done(folder)
    shape = (len(windows), windows.shape[1], blocks.width)

    def stream(kind: str, index: int) -> Stream:
        return Stream(folder / f"{kind}-{index}.bin", shape, _STREAM)

    def passage(kind: str, index: int, block: nn.Module, count: int) -> Passage:
        rows = list(parts(count, settings.batch_size))
        how = (stream(kind, index), rows, settings.precision, folder)
        return Passage(blocks, index, block, *how, shared=False)  # one process does all of it

    if done == 0:
        _embed(blocks, windows, settings.batch_size, [stream(kind, 0) for kind in _KINDS])
    for index in range(done, len(blocks)):
        block = blocks.make(index)
        targets = stream("dense", index + 1)
        passage("dense", index, block, len(windows)).write(targets)
        own = within(choose, blocks.name(index))
        prepare(block, own, scale_init, stored, settings.gradient, settings.fused)
        if settings.compensated:
            some = min(settings.compensated, len(windows))
            _compensate(passage("quantized", index, block, some), scale_init)
        through = passage("quantized", index, block, len(windows))
        before, after = _train(through, targets, settings)
        if not math.isfinite(after):
            raise QexportError(
                f"block {index + 1} has diverged; lower --block-lr, or check the model for NaN."
            )
        through.write(stream("quantized", index + 1))
        tensors = {blocks.name(index) + n: p.detach().cpu() for n, p in block.named_parameters()}
        save_file(tensors, folder / f"block-{index}.safetensors")
        write_json(folder / DONE, {"done": index + 1})
        for kind in _KINDS:
            (folder / f"{kind}-{index}.bin").unlink(missing_ok=True)
        blocks.release(index)
        tell(index, before, after)


def _embed(blocks: Blocks, windows: Tensor, batch_size: int, streams: list[Stream]) -> None:
    """Begin streams with the windows' embeddings."""
    for rows in parts(len(windows), batch_size):
        embedded = blocks.embed(windows[rows])
        for stream in streams:
            stream.write(rows, embedded)
    blocks.forget_embeddings()


def prepared_block(
    blocks: Blocks,
    index: int,
    choose: Choose,
    scale_init: Literal["paper", "mse"],
    stored: torch.dtype,
    gradient: Gradient,
    *,
    fused: bool,
    trained: Path,
) -> nn.Module:
    """A block made trainable, with what the folder `trained` has of it, if it has."""
    block, prefix = blocks.make(index), blocks.name(index)
    prepare(block, within(choose, prefix), scale_init, stored, gradient, fused)
    found = _parameters(trained, index).items()
    if found:
        block.load_state_dict({name.removeprefix(prefix): value for name, value in found})
    return block


def within(choose: Choose, prefix: str) -> Choose:
    """`choose` for the layers of a block, which have short names."""
    return lambda name: choose(prefix + name)


def load_blocks(folder: Path, model: nn.Module) -> None:
    """Put what was trained into a prepared `model`."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for index in range(_done(folder)):
            for name, value in _parameters(folder, index).items():
                parameters[name].copy_(value)


def _parameters(folder: Path, index: int) -> dict[str, Tensor]:
    """What was trained of a block, by the names of a prepared model; nothing if it was not."""
    path = folder / f"block-{index}.safetensors"
    return load_file(path) if index < _done(folder) else {}


def _done(folder: Path) -> int:
    try:
        return int(json.loads((folder / DONE).read_text(encoding="utf-8"))["done"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def parts(count: int, size: int) -> Iterator[slice]:
    """`count` rows, `size` at a time."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@torch.no_grad()
def _compensate(passage: Passage, scale_init: Literal["paper", "mse"]) -> None:
    """Begin with GPTQ's codes: each layer's, by what the ones before it make of the inputs."""
    for names in STAGES:
        found = passage.look(names[:1], settled=True)
        seen = Inputs.of(found[names[0]].hessian)
        for layer in [passage.block.get_submodule(name) for name in names]:
            if not parametrize.is_parametrized(layer, "weight"):
                continue  # it stays dense, in float32
            chain: Any = layer.parametrizations.weight  # type: ignore[union-attr]
            if not isinstance(chain[0], FakeQuantize):
                continue
            reader, master = chain[0], chain.original
            weights = importance(seen.hessian)
            reader.alpha.copy_(initial_alpha(master, reader.scheme, scale_init, weights))
            fit = Fit(effective_scale(reader.alpha, reader.scheme))
            master.copy_(compensate(master, seen, fit, reader.scheme))
    passage.forget()


def _train(passage: Passage, targets: Stream, settings: BlockSettings) -> tuple[float, float]:
    """Train one block; the error of its first batch before and after, of all where none is."""
    block, device, count = passage.block, passage.device, passage.count
    if not settings.epochs:
        each = [_error(passage, targets, rows) for rows in parts(count, settings.batch_size)]
        return (sum(each) / len(each),) * 2
    scales = [p for name, p in block.named_parameters() if name.endswith(".alpha")]
    weights = [p for name, p in block.named_parameters() if not name.endswith(".alpha")]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": settings.lr}, {"params": scales, "lr": settings.scale_lr}],
        weight_decay=0.0,
        betas=(0.9, 0.95),
    )
    steps = settings.epochs * -(-count // settings.batch_size)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    dice = torch.Generator().manual_seed(settings.seed + (passage.index << 32))
    orders = [torch.randperm(count, generator=dice) for _ in range(settings.epochs)]
    shown = orders[0][: settings.batch_size]
    before = _error(passage, targets, shown)
    for order in orders:
        for part in parts(count, settings.batch_size):
            rows = order[part]
            loss = relative_errors(passage.run(rows), targets.read(rows, device)).mean()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    return before, _error(passage, targets, shown)


@torch.no_grad()
def _error(passage: Passage, targets: Stream, rows: slice | Tensor) -> float:
    """What the block's output for some windows has lost."""
    made = passage.run(rows)
    return lost_share(relative_errors(made, targets.read(rows, passage.device)))
