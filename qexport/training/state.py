"""Training state on disk: what a killed run needs to go on as if it had never stopped.

A checkpoint is a folder `checkpoint-N` with the masters, the optimizer's moments and the random
number generators in safetensors and JSON, never pickle. It is written under another name, flushed
to the disk and renamed, so that a folder of that name is always whole.
"""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import TrainerState

from qexport.errors import CheckpointError
from qexport.output import disk_errors
from qexport.ranks import assign, is_main, like, whole
from qexport.shards import plan_file
from qexport.stream import FileWriter

__all__ = [
    "check_whole",
    "drop_checkpoints",
    "drop_damaged",
    "last_checkpoint",
    "load_masters",
    "load_moments",
    "load_optimizer",
    "load_progress",
    "load_random",
    "load_schedule",
    "save",
    "step_of",
]

_PREFIX = "checkpoint-"
_KEPT = 2
_MASTERS, _MOMENTS = "masters.safetensors", "optimizer.safetensors"


def last_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = _checkpoints(run)
    return found[-1] if found else None


def drop_damaged(run: Path) -> list[Path]:
    """Remove checkpoints that a disk has damaged, if an older one is whole; returns their names."""
    damaged = []
    for folder in reversed(_checkpoints(run)):
        try:
            check_whole(folder)
        except CheckpointError:
            damaged.append(folder)
            continue
        for one in damaged:
            shutil.rmtree(one, ignore_errors=True)
        return damaged
    return []


def check_whole(folder: Path) -> None:
    """Raise CheckpointError for a checkpoint that lacks a file, or has one that ends early."""
    with _damage(folder):
        for name in (_MASTERS, _MOMENTS):
            with safe_open(folder / name, framework="pt"):
                pass
        for name in ("state.json", "trainer_state.json"):
            json.loads((folder / name).read_text(encoding="utf-8"))


def drop_checkpoints(run: Path, keep: int = 0) -> None:
    """Remove all but the `keep` newest checkpoints, and what a kill left half-written."""
    found = _checkpoints(run)
    for folder in found[: len(found) - keep]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in run.glob(f".{_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def save(
    run: Path,
    trainer_state: TrainerState,
    model: nn.Module,
    moments: Mapping[Tensor, Mapping[str, Any]],
    scheduler: Any,
    progress: dict[str, Any],
) -> Path:
    """Write `checkpoint-<step>` into `run`; `progress` is JSON of the caller's own.

    moments   the optimizer's state of each parameter: tensors, and numbers

    Every process has to call it, and the first one writes: a tensor at a time, so that of what is
    spread over processes no more than that is ever whole.
    """
    step = trainer_state.global_step
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    numbers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for parameter, fields in moments.items():
        for key, value in fields.items():
            (tensors if torch.is_tensor(value) else numbers)[f"{names[parameter]}|{key}"] = value
    final, temporary = run / f"{_PREFIX}{step}", run / f".{_PREFIX}{step}"
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
    with disk_errors(run):
        if is_main():
            temporary.mkdir()
        _write(temporary / _MASTERS, {name: parameter for parameter, name in names.items()})
        _write(temporary / _MOMENTS, {**tensors, **_random_tensors()})
        if not is_main():
            return final
        values = {
            "numbers": numbers,
            "scheduler": scheduler.state_dict(),
            "python_random": random.getstate(),
            "numpy_random": _numpy_state(),
            "progress": progress,
        }
        (temporary / "state.json").write_text(json.dumps(values), encoding="utf-8")
        trainer_state.save_to_json(str(temporary / "trainer_state.json"))
        _flush(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush(run)
    drop_checkpoints(run, keep=_KEPT)
    return final


def load_masters(folder: Path, model: nn.Module) -> None:
    """Restore masters. Raises CheckpointError where they are damaged or of another model."""
    with _damage(folder):
        parameters = dict(model.named_parameters())
        with safe_open(folder / _MASTERS, framework="pt") as file:
            if set(file.keys()) != set(parameters):
                raise ValueError("its parameters are not this model's")
            for name, parameter in parameters.items():
                assign(parameter, file.get_tensor(name))


def load_moments(folder: Path, model: nn.Module) -> Iterator[tuple[Tensor, str, Any]]:
    """What `save` was given: parameter, name and value, one whole tensor at a time.

    Raises CheckpointError where they are damaged.
    """
    parameters = dict(model.named_parameters())
    with _damage(folder):
        with safe_open(folder / _MOMENTS, framework="pt") as file:
            for key in list(file.keys()):
                name, _, field = key.partition("|")
                if name != "random":
                    yield parameters[name], field, file.get_tensor(key)
        for key, number in _values(folder)["numbers"].items():
            name, _, field = key.partition("|")
            yield parameters[name], field, number


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore an optimizer's moments. Raises CheckpointError where they are damaged."""
    fused = bool(optimizer.param_groups[0].get("fused"))
    for parameter, field, value in load_moments(folder, model):
        found = value
        if torch.is_tensor(value):
            if value.shape == parameter.shape:
                found = like(value, parameter)
            elif fused or field != "step":  # the others keep their count on the host
                found = value.to(parameter.device)
        optimizer.state[parameter][field] = found


def load_schedule(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Restore where the rates stand. Raises CheckpointError where that is damaged."""
    with _damage(folder):
        scheduler.load_state_dict(_values(folder)["scheduler"])
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # a schedule sets it only with its next step


def load_random(folder: Path) -> None:
    """Restore the random generators. Raises CheckpointError where the checkpoint is damaged."""
    with _damage(folder):
        with safe_open(folder / _MOMENTS, framework="pt") as file:
            for key in list(file.keys()):
                if key.startswith("random|"):
                    _set_random(key.removeprefix("random|"), file.get_tensor(key))
        values = _values(folder)
        version, words, gauss = values["python_random"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(_numpy_tuple(values["numpy_random"]))


def load_progress(folder: Path) -> dict[str, Any]:
    """The `progress` that `save` was given. Raises CheckpointError where damaged."""
    with _damage(folder):
        progress: dict[str, Any] = _values(folder)["progress"]
    return progress


def _values(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return found


@contextlib.contextmanager
def _damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is damaged ({error}); remove it, or start over with --no-resume."
        ) from error


def step_of(folder: Path) -> int:
    """The steps that a checkpoint comes after."""
    return int(folder.name.removeprefix(_PREFIX))


def _checkpoints(run: Path) -> list[Path]:
    found = [path for path in run.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit()]
    return sorted(found, key=step_of)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors, each gathered when its turn comes; the others take part in that."""
    if not is_main():
        for tensor in tensors.values():
            whole(tensor)
        return
    plan = plan_file(path.name, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    with FileWriter(path.parent, [plan]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, whole(tensor))


def _random_tensors() -> dict[str, Tensor]:
    states = {"random|cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random|cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random(field: str, state: Tensor) -> None:
    if field == "cpu":
        torch.set_rng_state(state)
    elif torch.cuda.is_available():
        torch.cuda.set_rng_state(state)


def _numpy_state() -> list[Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return [name, np.asarray(keys).tolist(), *rest]


def _numpy_tuple(state: list[Any]) -> tuple[Any, ...]:
    name, keys, *rest = state
    return (name, np.array(keys, dtype=np.uint32), *rest)


def _flush(folder: Path) -> None:
    """Bring a folder and the files in it to the disk."""
    for path in [*folder.iterdir(), folder]:
        if path.is_file() or path == folder:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
