"""The training loop: transformers' Trainer with our state on disk, from a model to a RUN."""

import contextlib
import fcntl
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from qexport.checkpoint import CONFIG_VERSION, Checkpoint, Modules, modules_to_json, open_source
from qexport.data import documents, hold_out, tokenize, windows
from qexport.errors import CheckpointError, DataError, InputError, QexportError
from qexport.modelling import build_model, load_tokenizer
from qexport.output import check_writable, disk_errors, mark, marker, strangers, write_json
from qexport.shards import ShardWriter
from qexport.train import state
from qexport.train.config import TrainConfig
from qexport.train.prepare import prepare, run_tensors
from qexport.train.progress import ProgressReport
from qexport.train.trainer import QatTrainer, ShuffledWindows, make_trainer

__all__ = ["train"]


def train(config: TrainConfig, console: Console, *, dry_run: bool = False) -> dict[str, Any]:
    """Train a RUN into `config.output`; returns what `all_results.json` holds.

    A dry run checks and announces everything, trains nothing and writes nothing.
    A run of the same settings that was killed goes on from its last checkpoint, and one that is
    finished is not trained again. Raises InputError, DataError or CheckpointError before anything
    is written where the model, the data or the output folder will not do.
    """
    source = _dense_source(config.model)
    finished = _finished(config)
    if finished is not None:
        console.print(f"{config.output} is finished already; --no-resume trains it anew.")
        return finished
    tokenizer = load_tokenizer(config.model)
    training, held_out = _load_windows(config, tokenizer)
    max_steps = config.max_steps
    if max_steps is None:
        per_step = config.batch_size * config.gradient_accumulation
        max_steps = max(1, len(training) // per_step)
    precision = _precision(config)
    model, stored = _load_model(source)
    _check_fit(config, model, training)
    modules = prepare(model, config.scheme, config.scale_init, stored)
    _check_names(source, model, stored)
    _announce(console, config, model, training, max_steps, precision)
    if dry_run:
        return {"steps": max_steps, "tokens": max_steps * config.tokens_per_step}
    with _claimed(config) as run, disk_errors(run):
        resumed = state.last_checkpoint(run)
        if resumed is not None:
            console.print(f"resuming from {resumed.name}")
        report = ProgressReport(console, config.tokens_per_step)
        trainer = make_trainer(config, model, training, max_steps, precision, report)
        if max_steps:
            with contextlib.closing(report):
                trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        results = _results(trainer, config, max_steps, held_out)
        _write_run(run, source, model, modules, stored, trainer, results)
        mark(run, "run", status="finished", settings=config.identity())
        state.drop_checkpoints(run)
    return results


def _dense_source(folder: Path) -> Checkpoint:
    source = open_source(folder)
    if source is None or source.layout != "dense":
        raise InputError(f"{folder} is quantized already; train from a dense checkpoint.")
    return source


def _finished(config: TrainConfig) -> dict[str, Any] | None:
    """The results of an equal run that is finished. Raises InputError over another run's folder."""
    check_writable(config.output, "run")
    found = marker(config.output)
    if found is None or not config.resume:
        return None
    mine, theirs = config.identity(), found.get("settings")
    if not isinstance(theirs, dict):
        raise CheckpointError(f"{config.output}/qexport.json is damaged; --no-resume starts over.")
    for key, value in mine.items():
        if theirs.get(key) != value:
            raise InputError(
                f"{config.output} holds another run ({key} {theirs.get(key)!r}, now {value!r}); "
                "choose another -o, or --no-resume to start over."
            )
    if found.get("status") != "finished":
        return None
    try:
        results: dict[str, Any] = json.loads((config.output / "all_results.json").read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{config.output}/all_results.json is damaged; --no-resume starts over."
        ) from error
    return results


@contextlib.contextmanager
def _claimed(config: TrainConfig) -> Iterator[Path]:
    """The run folder, ours alone for the block; removed on failure while it holds no checkpoint."""
    run = config.output
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QexportError(
            f"{run} cannot be made ({error.strerror}); choose another -o."
        ) from error
    lock = (run / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise InputError(f"another process is training {run}; wait for it or stop it.") from None
    try:
        if not config.resume:
            _clear(run)
        state.drop_checkpoints(run, keep=1)
        if marker(run) is None:
            mark(run, "run", status="training", settings=config.identity())
        yield run
    finally:
        found = marker(run)
        if (found is None or found.get("status") != "finished") and not state.last_checkpoint(run):
            _clear(run)
            (run / ".lock").unlink(missing_ok=True)
            if not any(run.iterdir()):
                run.rmdir()
        else:
            (run / ".lock").unlink(missing_ok=True)
        lock.close()


def _clear(run: Path) -> None:
    """Remove what we wrote into a run folder that we hold the lock of, and nothing else."""
    kept = {*strangers(run), ".lock"}
    for path in run.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _load_windows(config: TrainConfig, tokenizer: Any) -> tuple[Tensor, Tensor | None]:
    """Training windows, and held-out ones where there is text enough for one."""
    if config.eval_data is not None:
        texts = list(documents(config.data, "train", tokenizer))
        held = list(documents(config.eval_data, "eval", tokenizer))
    elif config.data == "builtin":
        texts = list(documents("builtin", "train", tokenizer))
        held = list(documents("builtin", "eval", tokenizer))
    else:
        texts, held = hold_out(list(documents(config.data, "train", tokenizer)))
    if not texts:
        texts, held = held, []
    training = windows(tokenize(texts, tokenizer), config.max_length)
    if config.eval_data is not None:
        return training, windows(tokenize(held, tokenizer), config.max_length)
    try:
        return training, windows(tokenize(held, tokenizer), config.max_length)
    except DataError:
        # Too few documents to hold out: the last windows of the text, where it has enough.
        count = len(training) // 20
        return (training[:-count], training[-count:]) if count else (training, None)


def _load_model(source: Checkpoint) -> tuple[Any, torch.dtype]:
    """The fp32 model and the dtype in which its unquantized parameters will be stored."""
    model = build_model(source, torch.float32, lambda name: source.dense(name).float())
    model.config.use_cache = False
    name = source.config.get("dtype") or source.config.get("torch_dtype") or "float32"
    stored = getattr(torch, str(name), torch.float32)
    if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
        raise CheckpointError(f"{source.folder}/config.json: dtype {name!r} is no float dtype.")
    return model, stored


def _check_fit(config: TrainConfig, model: Any, training: Tensor) -> None:
    """Raise InputError where the text or its windows do not fit the model."""
    if int(training.max()) >= model.config.vocab_size:
        raise InputError(f"{config.model}: its tokenizer gives tokens outside its vocabulary.")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and config.max_length > context:
        raise InputError(f"--max-length {config.max_length} is beyond the context of {context}.")


def _check_names(source: Checkpoint, model: nn.Module, stored: torch.dtype) -> None:
    """Raise CheckpointError unless the RUN would have exactly the source's tensors."""
    mine = {name for name, _ in run_tensors(model, stored) if not name.endswith("_scale")}
    tied = {"lm_head.weight"}
    odd = sorted((set(source) ^ mine) - tied)
    if odd:
        raise CheckpointError(
            f"{source.folder}: transformers renames or drops {odd[0]} of this architecture, so "
            "that a run of it could not be written back; it is not supported yet."
        )


def _precision(config: TrainConfig) -> str:
    """bf16 where the device multiplies it natively, unless told otherwise."""
    if config.precision != "auto":
        return config.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def _announce(
    console: Console,
    config: TrainConfig,
    model: nn.Module,
    training: Tensor,
    max_steps: int,
    precision: str,
) -> None:
    trainable = sum(p.numel() for p in model.parameters())
    alphas = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".alpha"))
    largest = max(p.numel() for p in model.parameters())
    # Master, gradient and two moments in fp32; served values and codes kept for the backward pass.
    memory = trainable * 16 + trainable * 5 + largest * 8
    console.print(
        f"{trainable:,} trainable parameters ({alphas:,} scales), {config.scheme}, {precision}; "
        f"about {memory / 2**30:.1f} GiB and activations",
        highlight=False,
    )
    console.print(
        f"{max_steps} steps of {config.tokens_per_step:,} tokens at a peak rate of "
        f"{config.learning_rate:g}; {training.numel():,} tokens of text, "
        f"{max_steps * config.tokens_per_step / training.numel():.2f} passes",
        highlight=False,
    )


def _results(
    trainer: QatTrainer, config: TrainConfig, max_steps: int, held_out: Tensor | None
) -> dict[str, Any]:
    history = [row for row in trainer.state.log_history if "loss" in row]
    summary = [row for row in trainer.state.log_history if "train_loss" in row]
    results: dict[str, Any] = {
        "steps": max_steps,
        "tokens": max_steps * config.tokens_per_step,
        "train_loss": summary[-1]["train_loss"] if summary else None,
        "final_loss": history[-1]["loss"] if history else None,
        "train_runtime": summary[-1]["train_runtime"] if summary else None,
    }
    if held_out is not None:
        dataset = ShuffledWindows(held_out, len(held_out), 0)
        loss = trainer.evaluate(dataset)["eval_loss"]
        results |= {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        results["eval_tokens"] = held_out.numel()
    return results


def _write_run(
    run: Path,
    source: Checkpoint,
    model: Any,
    modules: Modules,
    stored: torch.dtype,
    trainer: QatTrainer,
    results: dict[str, Any],
) -> None:
    """Write the RUN beside its checkpoints; config.json, which makes it readable, comes last."""
    staging = run / ".final"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    writer = ShardWriter(staging)
    for name, tensor in run_tensors(model, stored):
        writer.add(name, tensor)
    writer.close()
    source.copy_files(staging)
    trainer.state.save_to_json(str(staging / "trainer_state.json"))
    evaluation = {key: value for key, value in results.items() if key.startswith("eval_")}
    write_json(staging / "all_results.json", results)
    write_json(staging / "eval_results.json", evaluation)
    quantization = {
        "quant_method": "qexport",
        "format": "latent",
        "version": CONFIG_VERSION,
        "config_groups": modules_to_json(modules),
    }
    write_json(staging / "config.json", {**source.config, "quantization_config": quantization})
    for file in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        file.replace(run / file.name)
    staging.rmdir()
