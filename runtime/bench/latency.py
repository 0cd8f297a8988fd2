"""Latency of engines side by side: batches by prompt lengths by output lengths.

Engines are loaded once, each in a process of its own, and take turns: every repeat of a cell goes
to all of them before the next one. They get the same tokens, new ones for each repeat, and answer
greedily; what they answer is compared.
"""

import hashlib
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from qexport.checkpoint import Checkpoint, weight_files
from qexport.errors import InputError, QexportError
from qexport.formats import open_checkpoint
from qexport.runtime.bench.backends import Answers, Options
from qexport.runtime.bench.contender import Contender, Running
from qexport.runtime.bench.noise import Noise
from qexport.runtime.bench.roofs import roofs
from qexport.runtime.bench.statistics import percentiles, request_times
from qexport.runtime.loader import best_device
from qexport.runtime.machine import describe
from qexport.runtime.plan import PAYS

__all__ = ["SCHEMA", "Settings", "crossovers", "measure_latency", "step_seconds"]

SCHEMA = "qexport.bench.latency/1"
_PAUSE = 0.1  # for threads of the one before to go to sleep
_WARM_TOKENS = 4
_ENDS = 1 << 20  # bytes
_HEAD_BYTES: dict[int | None, float] = {8: 8.25 / 8, 4: 4.5 / 8}  # of a weight, by --head-bits
_HEAD_NAMES = ("lm_head.weight", "model.embed_tokens.weight")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    batches, prompts, outputs   sequences at a time, tokens of each, tokens generated: every
                                combination is a cell
    repeats, warmups            of each cell and contender
    seed                        of the prompts' tokens
    python                      that has vLLM, where it is another one
    """

    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    repeats: int = 5
    warmups: int = 1
    seed: int = 0
    serving: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    llama: str | None = None
    python: str | None = None

    @property
    def cells(self) -> list[tuple[int, int, int]]:
        return list(product(self.batches, self.prompts, self.outputs))

    @property
    def options(self) -> Options:
        context = max(self.prompts) + max(self.outputs)
        return Options(max(self.batches), context, self.threads, self.serving, self.llama)


def measure_latency(
    contenders: list[Contender], settings: Settings, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Everything of the report, as JSON has it. Raises what a contender's start does."""
    for contender in contenders:
        contender.check(settings.options, settings.python)
    checkpoints = [open_checkpoint(contender.path) for contender in contenders]
    vocabulary = min(_vocabulary(checkpoint) for checkpoint in checkpoints)
    running: list[Running] = []
    noise = Noise()
    try:
        for contender in contenders:
            tell(f"loading {contender.name}")
            running.append(Running(contender, settings.options, settings.python))
        cells: list[dict[str, Any]] = []
        for sizes in settings.cells:
            tell("batch {}, prompts of {}, {} tokens each".format(*sizes))
            cells += _measure_cell(running, sizes, vocabulary, settings, noise, tell)
        peaks = [one.peaks() for one in running]
    finally:
        for one in running:
            one.close()
    head_bits = settings.options.serving.get("head_bits")
    rows = [_row(*each, head_bits) for each in zip(running, checkpoints, peaks, strict=True)]
    for cell in cells:
        _add_rates(cell, next(row for row in rows if row["name"] == cell["contender"]))
    return {
        "schema": SCHEMA,
        "machine": describe(),
        "settings": {
            "repeats": settings.repeats,
            "warmups": settings.warmups,
            "seed": settings.seed,
            "threads": settings.threads,
        },
        "roofs": _roofs(),
        "noise": {"clean": not noise.reasons(), "reasons": noise.reasons()},
        "contenders": rows,
        "cells": cells,
        "crossovers": crossovers(cells, contenders[0].name),
    }


def _row(
    one: Running, checkpoint: Checkpoint, peaks: tuple[int, int], head_bits: int | None
) -> dict[str, Any]:
    """What is told of a contender beside its cells."""
    return {
        "name": one.contender.name,
        "backend": one.contender.backend,
        "version": one.version,
        "kernel": one.kernel,
        "load_seconds": round(one.load_seconds, 2),
        "peak_memory_bytes": peaks[0],
        "peak_device_bytes": peaks[1],
        "fingerprint": _fingerprint(one.contender.path),
        **_about(checkpoint, one, head_bits if one.contender.backend == "native" else None),
    }


def _measure_cell(
    running: list[Running],
    sizes: tuple[int, int, int],
    vocabulary: int,
    settings: Settings,
    noise: Noise,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for each contender, with its raw samples."""
    batch, prompt, output = sizes
    runs: dict[int, list[Answers]] = {index: [] for index in range(len(running))}
    failures: dict[int, str] = {}
    for repeat in range(-settings.warmups, settings.repeats):
        dice = random.Random(f"{settings.seed} {sizes} {repeat}")
        prompts = [dice.choices(range(vocabulary), k=prompt) for _ in range(batch)]
        for index, one in enumerate(running):
            if index in failures:
                continue
            time.sleep(_PAUSE)
            noise.begin(one.cpu_seconds())
            try:
                answers = one.run(prompts, output if repeat >= 0 else min(output, _WARM_TOKENS))
            except QexportError as error:
                failures[index] = str(error)
                tell(f"left out at this size: {error}")
                continue
            noise.end(one.cpu_seconds())
            if repeat >= 0:
                runs[index].append(answers)
    rows = []
    for index, one in enumerate(running):
        name = one.contender.name
        row = {"contender": name, "batch": batch, "prompt": prompt, "output": output}
        if index in failures:
            rows.append({**row, "failure": failures[index]})
            continue
        noise.spread(f"{name} at batch {batch}", [max(t[-1] for t in r.times) for r in runs[index]])
        rows.append({**row, **_summary(runs[index], runs.get(0, []))})
    return rows


def _summary(runs: list[Answers], first: list[Answers]) -> dict[str, Any]:
    """Figures of a cell; `first` is what the first contender answered."""
    times = [times for answers in runs for times in answers.times]
    found: dict[str, Any] = {name: percentiles(v) for name, v in request_times(times).items()}
    rates = [sum(map(len, r.times)) / max(t[-1] for t in r.times) for r in runs]
    found["tokens_per_second"] = percentiles(rates)
    pairs = [
        (ours, theirs)
        for mine, other in zip(runs, first, strict=False)
        for ours, theirs in zip(mine.tokens, other.tokens, strict=True)
    ]
    same = sum(ours == theirs for ours, theirs in pairs)
    found["same_answers"] = same / len(pairs) if pairs else None
    found["samples"] = [
        {"times": [[round(at, 6) for at in times] for times in answers.times]} for answers in runs
    ]
    return found


def _add_rates(cell: dict[str, Any], contender: dict[str, Any]) -> None:
    """Tokens per second of one user, and the bytes a second that steps have read."""
    if "failure" in cell:
        return
    step = step_seconds(cell)
    if not step:
        return
    cell["tokens_per_second_per_user"] = 1 / cell["tpot"]["p50"]
    middle = cell["prompt"] + cell["output"] / 2
    keys = cell["batch"] * middle * contender["cache_bytes_per_token"]
    cell["step_bytes"] = contender["step_weight_bytes"] + keys
    cell["achieved_gbps"] = cell["step_bytes"] / step / 1e9


def step_seconds(cell: dict[str, Any]) -> float | None:
    """The median gap between tokens: a step of the whole batch, when all prompts have run.

    TPOT has the others' prompts in it, which run beside a sequence's first tokens.
    """
    found: float | None = cell.get("itl", {}).get("p50")
    return found


def crossovers(cells: list[dict[str, Any]], first: str) -> list[dict[str, Any]]:
    """The batch from which on the contender `first` takes nine tenths of another's step, or more.

    None where it is ahead at the largest batch that was measured.
    """
    times: dict[tuple[int, int], dict[str, dict[int, float]]] = {}
    for cell in cells:
        step = step_seconds(cell)
        if step:
            group = times.setdefault((cell["prompt"], cell["output"]), {})
            group.setdefault(cell["contender"], {})[cell["batch"]] = step
    found = []
    for (prompt, output), group in times.items():
        ours = group.pop(first, {})
        for name, theirs in group.items() if ours else ():
            both = sorted(set(ours) & set(theirs))
            ahead = [batch for batch in both if ours[batch] < PAYS * theirs[batch]]
            batch = next((b for b in both if not ahead or b > ahead[-1]), None)
            row = {"prompt": prompt, "output": output, "contender": first, "against": name}
            found.append({**row, "batch": batch})
    return found


def _roofs() -> dict[str, Any]:
    found = roofs(best_device())
    return {
        "device": found.name,
        "bytes_per_second": found.bandwidth,
        "operations_per_second": found.flops,
        "int8_operations_per_second": found.int8 or None,
    }


def _vocabulary(checkpoint: Checkpoint) -> int:
    size = checkpoint.config.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise InputError(f"{checkpoint.folder} does not say its vocab_size.")
    return size


def _about(checkpoint: Checkpoint, one: Running, head_bits: int | None) -> dict[str, Any]:
    """What is on the disk, and what of it a step reads; of a head that is rounded, its own bits."""
    entries = checkpoint.entries
    schemes = sorted({str(scheme) for scheme, _ in checkpoint.modules.values()})
    quantized = [entry for entry in entries.values() if entry.scheme is not None]
    weights = sum(entry.shape[0] * entry.shape[1] for entry in quantized)
    stored = sum(entry.stored_bytes for entry in quantized)
    reference = one.kernel.startswith("reference")
    wide = "float32" in one.kernel or (reference and best_device().type == "cpu")
    dense = reference or one.contender.backend == "transformers"
    read, multiplied = weights * (4 if wide else 2) if dense else stored, weights
    untied = _HEAD_NAMES[0] in entries
    for name, entry in entries.items():
        table = name == _HEAD_NAMES[1] and untied  # of which a step reads a row for each token
        if entry.scheme is None and not table:
            rounded = head_bits in _HEAD_BYTES and name in _HEAD_NAMES
            count = math.prod(entry.shape)
            read += round(count * _HEAD_BYTES[head_bits]) if rounded else entry.stored_bytes
            multiplied += count
    config = checkpoint.config
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
    dim = config.get("head_dim") or config.get("hidden_size", 0) // max(
        1, config.get("num_attention_heads") or 1
    )
    return {
        "layout": checkpoint.layout,
        "schemes": schemes,
        "bits_per_weight": stored * 8 / weights if weights else None,
        "stored_bytes": sum(entry.stored_bytes for entry in entries.values()),
        "step_weight_bytes": read,
        "operations_per_token": 2 * multiplied,
        "cache_bytes_per_token": 4 * int(config.get("num_hidden_layers") or 0) * heads * dim,
    }


def _fingerprint(path: Path) -> str:
    """By which two reports know the same model again: sizes, and both ends of every file."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as data:
            digest.update(data.read(_ENDS))
            data.seek(max(0, size - _ENDS))
            digest.update(data.read(_ENDS))
    return digest.hexdigest()[:16]
