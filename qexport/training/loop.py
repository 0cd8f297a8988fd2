"""The training loop: transformers' Trainer with our state on disk, from a model to a RUN."""

import contextlib
import importlib.util
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from qexport.checkpoint import Checkpoint, Modules
from qexport.errors import InputError, UnsupportedError
from qexport.experts import expert_of
from qexport.layers import quantizable, quantized_modules
from qexport.modelling import build_model, load_tokenizer, meta_model
from qexport.output import disk_errors
from qexport.precision import autocast, precision_of
from qexport.ranks import barrier, is_main, join
from qexport.run_folder import (
    BLOCKS,
    DONE,
    claimed,
    finished,
    held_out_results,
    publish_run,
    stage_run,
)
from qexport.selection import DENSE
from qexport.source import check_names, dense_source, rounded, stored_dtype
from qexport.training import state
from qexport.training.alone import block_results, block_tensors
from qexport.training.block import load_blocks
from qexport.training.config import TrainConfig
from qexport.training.fuse import fusing
from qexport.training.held_out import held_out_loss
from qexport.training.init import check_init, start_from
from qexport.training.phases import make_teacher, start_by_blocks
from qexport.training.prepare import prepare, run_parts, run_tensors
from qexport.training.progress import ProgressReport
from qexport.training.report import write_report
from qexport.training.shard import load_sharded
from qexport.training.text import Text, Windows, load_text
from qexport.training.trainer import QatTrainer, make_trainer

__all__ = ["train"]


def train(config: TrainConfig, console: Console, *, dry_run: bool = False) -> dict[str, Any]:
    """Train a RUN into `config.output`; returns what `all_results.json` holds.

    A dry run checks and announces everything, trains nothing and leaves `config.output` as it is;
    the text is read, and its tokens are kept in the cache.
    A run of the same settings that was killed goes on from its last checkpoint, and one that is
    finished is not trained again. Raises InputError, DataError or CheckpointError before anything
    is written where the model, the data or the output folder will not do.
    """
    _check_packages(config)
    join(deepspeed=config.deepspeed is not None, offload=config.offload)
    console.quiet = console.quiet or not is_main()
    source = dense_source(config.model)
    plan, modules = _planned(config, source)
    identity = config.identity()
    found = finished(config.output, identity, resume=config.resume)
    if found is not None:
        console.print(f"{config.output} is finished already; --no-resume trains it anew.")
        return found
    job = _prepared(config, source, plan, modules, console)
    _announce(console, config, job)
    if dry_run:
        return {"steps": job.max_steps, "tokens": job.max_steps * config.tokens_per_step}
    claim = claimed(config.output, identity, resume=config.resume, progress=_progress)
    with claim as run, disk_errors(run):
        if is_main():
            for damaged in state.drop_damaged(run):
                console.print(f"{damaged} is damaged, and removed; the one before it is taken.")
        barrier()
        return _carry_out(config, job, run, console)


def _progress(run: Path) -> bool:
    """Whether a run that failed has something to go on from."""
    return state.last_checkpoint(run) is not None or (run / BLOCKS / DONE).exists()


@dataclass
class _Job:
    """What a run works with, once everything is checked.

    plan     the model without its weights, and what of it is quantized
    stored   dtype of the rest
    """

    source: Checkpoint
    text: Text
    plan: Any
    modules: Modules
    stored: torch.dtype
    max_steps: int
    precision: str
    fused: bool


def _planned(config: TrainConfig, source: Checkpoint) -> tuple[Any, Modules]:
    """The model without weights, and what of it is quantized. Raises where options do not fit."""
    plan = meta_model(source)
    modules = quantized_modules(plan, config.scheme_of)
    config.check_patterns(quantizable(plan))
    if not modules and config.bits != DENSE:
        raise InputError("no layer is left to be quantized; --bits 16 trains a dense model.")
    check_names(source, plan)
    if any(map(expert_of, modules)):
        raise InputError(
            f"{config.model} is a mixture of experts, which is not trained yet; qexport quantize "
            "takes it."
        )
    return plan, modules


def _prepared(
    config: TrainConfig, source: Checkpoint, plan: Any, modules: Modules, console: Console
) -> _Job:
    text = _text(config, console)
    max_steps = config.max_steps
    if max_steps is None:
        max_steps = max(1, len(text.rows) // config.windows_per_step)
    if config.phase == "block":
        max_steps = 0
    _check_fit(config, plan, text.rows.tokens)
    if config.init is not None:
        check_init(config, source, modules)
    fused = fusing(config, modules, max_steps, console)
    stored = stored_dtype(source)
    return _Job(
        source, text, plan, modules, stored, max_steps, precision_of(config.precision), fused
    )


def _text(config: TrainConfig, console: Console) -> Text:
    """The first process makes the tokens, and the others find them on the disk."""
    tokenizer = load_tokenizer(config.model)
    if not is_main():
        barrier()
    text = load_text(config, tokenizer, partial(console.print, highlight=False))
    if is_main():
        barrier()
    return text


def _carry_out(config: TrainConfig, job: _Job, run: Path, console: Console) -> dict[str, Any]:
    """Every phase, and the RUN that comes of them."""
    training, source = job.text.rows.tokens, job.source
    resumed = state.last_checkpoint(run)
    if resumed is not None:
        state.check_whole(resumed)
        console.print(f"resuming from {resumed.name}")
    elif config.init is not None:
        if is_main() and not (run / BLOCKS / DONE).exists():
            start_from(config.init, config, job.stored, run / BLOCKS)
        barrier()
    elif config.starts_by_blocks:
        if is_main():
            start_by_blocks(
                config, source, job.stored, training, job.precision, job.fused, run, console
            )
        barrier()
    parts = run_parts(job.plan, job.modules, job.stored)
    if config.phase == "block":
        results, files = {}, {}
        if is_main():
            results = block_results(config, source, job.stored, run, job.text.held_out)
        tensors = block_tensors(config, source, job.stored, run, parts)
    else:
        trainer = _trained(config, job, run, resumed, console)
        apart = job.text.held_out
        results = _results(trainer, config, job.max_steps, apart, job.precision, console)
        tensors = run_tensors(trainer.model, job.stored)
        files = {"trainer_state.json": asdict(trainer.state)}
    if is_main():
        staged = stage_run(run, source, job.modules, parts, tensors, results, files)
        shown = job.text.rows if job.text.held_out is None else job.text.held_out
        write_report(staged, source, results, shown.tokens)
        publish_run(run, config.identity())
        state.drop_checkpoints(run)
    elif config.phase != "block":
        deque(tensors, maxlen=0)  # its part of each
    barrier()
    return results


def _trained(
    config: TrainConfig, job: _Job, run: Path, resumed: Path | None, console: Console
) -> QatTrainer:
    """The steps end to end."""
    console.print("loading the model and choosing its first scales")
    model = _load_model(config, job, run)
    report = ProgressReport(console, config.tokens_per_step)
    trainer = make_trainer(config, model, job.text, job.max_steps, job.precision, report)
    if job.max_steps:
        if config.settings.distill:
            training = job.text.rows.tokens
            trainer.teacher = make_teacher(
                config, job.source, trainer, training, job.precision, run, console
            )
        with contextlib.closing(report):
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    return trainer


def _check_packages(config: TrainConfig) -> None:
    """Raise UnsupportedError where an option wants a package that is not installed."""
    wanted = {
        "--optimizer adamw8bit": ("bitsandbytes", config.optimizer == "adamw8bit"),
        "--deepspeed": ("deepspeed", config.deepspeed is not None),
    }
    for option, (package, asked) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise UnsupportedError(f"{option} wants {package}: pip install {package}.")


def _load_model(config: TrainConfig, job: _Job, run: Path) -> Any:
    """The prepared model, with the blocks that have been trained."""
    if config.shard:
        return load_sharded(config, job.source, job.stored, run / BLOCKS, fused=job.fused)
    source = job.source
    model = build_model(source, torch.float32, lambda name: source.dense(name).float())
    model.config.use_cache = False
    gradient = config.settings.gradient
    prepare(model, config.scheme_of, config.scale_init, job.stored, gradient, job.fused)
    load_blocks(run / BLOCKS, model)
    return model


def _check_fit(config: TrainConfig, model: Any, training: Tensor) -> None:
    """Raise InputError where the text or its windows do not fit the model."""
    if int(training.max()) >= model.config.vocab_size:
        raise InputError(f"{config.model}: its tokenizer gives tokens outside its vocabulary.")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and config.max_length > context:
        raise InputError(f"--max-length {config.max_length} is beyond the context of {context}.")


def _announce(console: Console, config: TrainConfig, job: _Job) -> None:
    max_steps, training = job.max_steps, job.text.rows.tokens
    alphas = sum(out * scheme.groups(inputs) for scheme, (out, inputs) in job.modules.values())
    trainable = sum(p.numel() for p in job.plan.parameters()) + alphas
    largest = max(p.numel() for p in job.plan.parameters())
    # Master, gradient and two moments in fp32; served values and codes kept for the backward pass.
    memory = trainable * 16 + trainable * 5 + largest * 8
    what = ", ".join(dict.fromkeys(str(scheme) for scheme, _ in job.modules.values())) or "dense"
    console.print(
        f"{trainable:,} trainable parameters ({alphas:,} scales), {what}, {job.precision}; "
        f"about {memory / 2**30:.1f} GiB and activations",
        highlight=False,
    )
    console.print(
        f"{max_steps} steps of {config.tokens_per_step:,} tokens at a peak rate of "
        f"{config.settings.lr:g}; {training.numel():,} tokens of text, "
        f"{max_steps * config.tokens_per_step / training.numel():.2f} passes",
        highlight=False,
    )
    if (said := rounded(job.source, job.stored)) is not None:
        console.print(said)


def _results(
    trainer: QatTrainer,
    config: TrainConfig,
    max_steps: int,
    held_out: Windows | None,
    precision: str,
    console: Console,
) -> dict[str, Any]:
    history = [row for row in trainer.state.log_history if "loss" in row]
    summary = [row for row in trainer.state.log_history if "train_loss" in row]
    seconds = trainer.seconds
    results: dict[str, Any] = {
        "steps": max_steps,
        "tokens": max_steps * config.tokens_per_step,
        "train_loss": summary[-1]["train_loss"] if summary else None,
        "final_loss": history[-1]["loss"] if history else None,
        "train_runtime": round(seconds, 4) if summary else None,
    }
    if held_out is not None:
        console.print(f"evaluating {held_out.tokens.numel():,} tokens of held-out text")
        device = trainer.args.device
        context = partial(autocast, precision, device)
        model = trainer.model.to(device)
        loss, targets = held_out_loss(model, held_out, config.batch_size, device, context)
        results |= held_out_results(loss, targets)
        trainer.log({"eval_loss": loss})
    return results
