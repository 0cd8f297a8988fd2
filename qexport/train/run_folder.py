"""A run's folder: who may write to it, what a kill leaves in it, and what a finished run holds."""

import contextlib
import fcntl
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerState

from qexport.checkpoint import (
    CONFIG_VERSION,
    Checkpoint,
    Modules,
    modules_to_json,
    open_source,
)
from qexport.errors import CheckpointError, InputError, QexportError
from qexport.output import check_writable, mark, marker, strangers, write_json
from qexport.shards import Parts, plan_shards
from qexport.stream import FileWriter
from qexport.train import state
from qexport.train.block import DONE
from qexport.train.config import TrainConfig
from qexport.train.ranks import barrier, is_main

__all__ = ["BLOCKS", "TEACHER", "claimed", "finished", "held_out_results", "write_run"]

BLOCKS, TEACHER = ".blocks", ".teacher"  # folders of what a resumed run need not do again


def finished(config: TrainConfig) -> dict[str, Any] | None:
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
            plain = not isinstance(value, (list, dict))
            how = f"{key} {theirs.get(key)!r}, now {value!r}" if plain else f"its {key} was another"
            raise InputError(
                f"{config.output} holds another run ({how}); choose another -o, or --no-resume to "
                "start over."
            )
    if found.get("status") != "finished":
        return None
    try:
        open_source(config.output)
        results: dict[str, Any] = json.loads((config.output / "all_results.json").read_text())
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(
            f"{config.output} was finished and is damaged ({error}); --no-resume starts over."
        ) from error
    return results


@contextlib.contextmanager
def claimed(config: TrainConfig) -> Iterator[Path]:
    """The run folder, ours alone for the block; removed on failure while it holds no progress.

    Of several processes the first one claims it, and the others wait for that.
    """
    run = config.output
    if not is_main():
        barrier()
        yield run
        return
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
        barrier()
        yield run
    finally:
        found = marker(run)
        if (found is None or found.get("status") != "finished") and not _progress(run):
            _clear(run)
            (run / ".lock").unlink(missing_ok=True)
            if not any(run.iterdir()):
                run.rmdir()
        else:
            (run / ".lock").unlink(missing_ok=True)
        lock.close()


def _progress(run: Path) -> bool:
    return state.last_checkpoint(run) is not None or (run / BLOCKS / DONE).exists()


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


def held_out_results(loss: float, tokens: int) -> dict[str, Any]:
    """What `all_results.json` says of a mean cross-entropy over held-out tokens."""
    perplexity = math.exp(min(loss, 700.0))
    return {"eval_loss": loss, "eval_perplexity": perplexity, "eval_tokens": tokens}


def write_run(
    run: Path,
    source: Checkpoint,
    modules: Modules,
    parts: Parts,
    tensors: Iterable[tuple[str, Tensor]],
    results: dict[str, Any],
    history: TrainerState | None,
) -> None:
    """Write the RUN beside its checkpoints; config.json, which makes it readable, comes last.

    `tensors` are those that `parts` promises; none is kept once it is written.
    """
    staging = run / ".final"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    files, index = plan_shards(parts)
    with FileWriter(staging, files) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
    for name, content in index.items():
        write_json(staging / name, content)
    source.copy_files(staging)
    if history is not None:
        history.save_to_json(str(staging / "trainer_state.json"))
    evaluation = {key: value for key, value in results.items() if key.startswith("eval_")}
    write_json(staging / "all_results.json", results)
    write_json(staging / "eval_results.json", evaluation)
    quantization = {
        "quant_method": "qexport",
        "format": "latent",
        "version": CONFIG_VERSION,
        "config_groups": modules_to_json(modules),
    }
    added = {"quantization_config": quantization} if modules else {}
    write_json(staging / "config.json", {**source.config, **added})
    for file in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        file.replace(run / file.name)
    staging.rmdir()
    for name in (BLOCKS, TEACHER):
        shutil.rmtree(run / name, ignore_errors=True)
