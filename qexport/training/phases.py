"""What comes before the steps end to end: the block-wise start, and the teacher's answers."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from qexport.blocks import Blocks
from qexport.checkpoint import Checkpoint
from qexport.modelling import build_model
from qexport.precision import autocast
from qexport.ranks import barrier, is_main
from qexport.run_folder import BLOCKS, TEACHER
from qexport.training.block import BlockSettings, train_blocks
from qexport.training.config import TrainConfig
from qexport.training.distill import CachedTeacher, LiveTeacher, Teacher
from qexport.training.text import MixedWindows
from qexport.training.trainer import QatTrainer

__all__ = ["make_teacher", "start_by_blocks"]


def start_by_blocks(
    config: TrainConfig,
    source: Checkpoint,
    stored: torch.dtype,
    training: Tensor,
    precision: str,
    fused: bool,
    run: Path,
    console: Console,
) -> None:
    """Train every block by itself; what comes of it stands in the run's folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = Blocks(source, stored, device, config.scheme_of)
    settings = BlockSettings(
        epochs=config.settings.block_epochs,
        compensated=min(config.settings.block_compensated, config.settings.block_windows),
        batch_size=config.settings.block_batch,
        lr=config.settings.block_lr,
        scale_lr=config.settings.block_scale_lr,
        gradient=config.settings.gradient,
        fused=fused,
        precision=precision,
        seed=config.seed,
    )

    def tell(index: int, before: float, after: float) -> None:
        console.print(
            f"block {index + 1}/{len(blocks)}  error {before:.2%} -> {after:.2%}", highlight=False
        )

    dice = torch.Generator().manual_seed(config.seed)
    asked = config.settings.block_windows
    if len(training) < asked:
        console.print(f"the text has {len(training)} windows for blocks, of the {asked} wanted")
    chosen = torch.randperm(len(training), generator=dice)[:asked]
    train_blocks(
        blocks,
        training[chosen],
        config.scheme_of,
        config.scale_init,
        stored,
        settings,
        run / BLOCKS,
        tell,
    )


def make_teacher(
    config: TrainConfig,
    source: Checkpoint,
    trainer: QatTrainer,
    training: Tensor,
    precision: str,
    run: Path,
    console: Console,
) -> Teacher:
    """The dense model, or what it says of every window that the run will meet."""
    vocabulary: int = trainer.model.config.vocab_size
    device, count = trainer.args.device, min(config.teacher_top_k or vocabulary, vocabulary)
    how = (count, config.settings.temperature, partial(autocast, precision, device))
    if config.teacher == "live":
        return LiveTeacher(_dense(source, device), *how)
    dataset = trainer.train_dataset
    assert isinstance(dataset, MixedWindows)
    order = dataset.first_windows()
    size = (len(training), config.max_length, count)
    if is_main():
        live = LiveTeacher(_dense(source, device), *how)
        asking = CachedTeacher(run / TEACHER, *size)
        for done in asking.fill(order, training, live, config.batch_size):
            if done % (50 * config.batch_size) == 0:
                console.print(f"asked the dense model of {done}/{len(order)} windows")
    barrier()
    return CachedTeacher(run / TEACHER, *size)


def _dense(source: Checkpoint, device: torch.device) -> Any:
    model = build_model(source, torch.float32, lambda name: source.dense(name).float())
    model.config.use_cache = False
    return model.to(device).eval()
