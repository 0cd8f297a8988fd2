"""From a dense model to a RUN of codes, one decoder block in memory at a time.

Activations of the calibration text stand in a file: what enters the next block is what the blocks
quantized so far make of the text, so that each one sees, and can make up for, what is lost before
it. A run that was killed goes on with the block that it was in.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qexport.blocks import Blocks, Stream
from qexport.checkpoint import Checkpoint, Modules, module_of
from qexport.errors import CheckpointError, InputError
from qexport.experts import expert_of
from qexport.grid import Scheme
from qexport.layers import quantizable, quantized_modules
from qexport.modelling import build_model, load_tokenizer, meta_model
from qexport.output import disk_errors, write_json
from qexport.precision import precision_of
from qexport.quantization.activations import STAGES, Passage, stages
from qexport.quantization.block import quantize_block
from qexport.quantization.calibration import calibration_windows
from qexport.quantization.config import METHODS, QuantizeConfig
from qexport.quantization.sensitivity import measure, too_wide, widths_for
from qexport.ranks import barrier, is_main, join, rank, world_size
from qexport.run_folder import BLOCKS, DONE, claimed, finished, publish_run, stage_run
from qexport.run_tensors import code_parts, code_tensors
from qexport.shards import Parts
from qexport.source import as_stored, check_names, dense_source, rounded, stored_dtype

__all__ = ["quantize_model"]

_STREAM = torch.bfloat16
_WIDTHS = "widths.json"
_SENSITIVITY = 16  # windows by which it is measured


def quantize_model(
    config: QuantizeConfig, console: Console, *, dry_run: bool = False
) -> dict[str, Any]:
    """Quantize into `config.output`; returns what `all_results.json` holds.

    A dry run checks and announces everything and writes nothing. A run of the same settings that
    was killed goes on with its next block, and one that is finished is not done again. Raises
    InputError, DataError or CheckpointError before anything is written where the model, the text
    or the output folder will not do.
    """
    join()
    console.quiet = console.quiet or not is_main()
    source = dense_source(config.model)
    plan, modules = _planned(config, source)
    identity = config.identity()
    found = finished(config.output, identity, resume=config.resume)
    if found is not None:
        console.print(f"{config.output} is finished already; --no-resume quantizes it anew.")
        return found
    windows = _windows(config, plan, console) if config.looks else None
    job = _Job(source, modules, stored_dtype(source), windows)
    _announce(console, config, job)
    if dry_run:
        return {"modules": len(job.modules)}
    claim = claimed(config.output, identity, resume=config.resume, progress=_progress)
    with claim as run, disk_errors(run):
        if config.target_bpw is not None:
            job = replace(job, modules=_mixed(config, job, run / BLOCKS, console))
        _Quantizer(config, job, run / BLOCKS, console).run()
        results = _results(config, job, run / BLOCKS)
        barrier()
        if is_main():
            tensors = _tensors(job, run / BLOCKS)
            stage_run(run, source, job.modules, job.parts(), tensors, results, {}, "codes")
            publish_run(run, identity)
        barrier()
    return results


@dataclass(frozen=True)
class _Job:
    """What a quantization works with, once everything is checked; `stored` is the rest's dtype."""

    source: Checkpoint
    modules: Modules
    stored: torch.dtype
    windows: Tensor | None

    def parts(self) -> Parts:
        """Dtypes and shapes of the RUN's tensors."""
        found: Parts = {}
        for name, entry in self.source.entries.items():
            module = module_of(name)
            if module in self.modules and module != name:
                found |= code_parts(module, *self.modules[module])
            else:
                found[name] = self.stored, entry.shape
        return found


def _planned(config: QuantizeConfig, source: Checkpoint) -> tuple[Any, Modules]:
    """The model without weights, and what of it is quantized. Raises where options do not fit."""
    plan = meta_model(source)

    def choose(name: str) -> Scheme | None:
        return config.fitting(name, plan.get_submodule(name).in_features)

    modules = quantized_modules(plan, choose)
    config.check_patterns(quantizable(plan))
    if not modules:
        raise InputError("no layer is left to be quantized.")
    check_names(source, plan)
    for name in _beside(modules):
        raise InputError(f"{name} is in no part of a block that is quantized here; --exclude it.")
    if config.target_bpw is not None and any(map(expert_of, modules)):
        raise InputError("--target-bpw is not for mixtures of experts yet; use --module-bits.")
    if config.target_bpw is not None:
        _check_least(config, modules, config.target_bpw)
    return plan, modules


def _windows(config: QuantizeConfig, plan: Any, console: Console) -> Tensor:
    """The calibration text, int64 [windows, length]. Raises InputError where it does not fit."""
    context = getattr(plan.config, "max_position_embeddings", None)
    if context is not None and config.length > context:
        raise InputError(f"--length {config.length} is beyond the context of {context}.")
    windows = calibration_windows(config, load_tokenizer(config.model), console.print)
    if len(windows) < world_size():
        raise InputError(f"{world_size()} processes have {len(windows)} windows of text.")
    if int(windows.max()) >= plan.config.vocab_size:
        raise InputError(f"{config.model}: its tokenizer gives tokens outside its vocabulary.")
    return windows


def _beside(modules: Modules) -> list[str]:
    """Layers that no stage of their block has: an expert that all tokens share, say."""
    blocks: dict[str, list[str]] = {}
    for name in modules:
        block = ".".join(name.split(".")[:3]) + "."  # as in model.layers.0.
        blocks.setdefault(block, []).append(name.removeprefix(block))
    staged = {
        block + name
        for block, layers in blocks.items()
        for stage in stages(layers)
        for group in stage
        for name in group
    }
    return [name for name in modules if name not in staged]


def _announce(console: Console, config: QuantizeConfig, job: _Job) -> None:
    schemes = [scheme for scheme, _ in job.modules.values()]
    names = [f"{s.grid.name} per tensor" if config.per_tensor else s.label for s in schemes]
    what = ", ".join(dict.fromkeys(names))
    if config.target_bpw is not None:
        what = f"{config.target_bpw:g} bits per weight"
    text = "no text" if job.windows is None else f"{job.windows.numel():,} tokens"
    console.print(f"{config.method} of {len(job.modules)} layers to {what}, by {text}")
    if (said := rounded(job.source, job.stored)) is not None:
        console.print(said)


def _progress(run: Path) -> bool:
    return (run / BLOCKS / DONE).exists()


def _check_least(config: QuantizeConfig, modules: Modules, target: float) -> None:
    """Raise InputError where the narrowest widths are more than `target` bits per weight."""
    weights = sum(out * inputs for _, (out, inputs) in modules.values())
    least = sum(
        min(scheme.bits_per_weight(inputs) for _, scheme in config.choices(name)) * out * inputs
        for name, (_, (out, inputs)) in modules.items()
    )
    if least > target * weights:
        raise too_wide(target, least / weights)


def _mixed(config: QuantizeConfig, job: _Job, folder: Path, console: Console) -> Modules:
    """The modules with widths that come to the target; measured once, and kept in `folder`."""
    assert config.target_bpw is not None
    assert job.windows is not None
    choices = {name: config.choices(name) for name in job.modules}
    kept = folder / _WIDTHS
    if not is_main():
        barrier()
    if kept.exists():
        widths: dict[str, str] = json.loads(kept.read_text(encoding="utf-8"))
    else:
        source = job.source
        model = build_model(source, torch.float32, lambda name: source.dense(name).float())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        windows = job.windows[:_SENSITIVITY]
        losses = measure(model.to(device), windows, choices, console.print)
        inputs = {name: shape[1] for name, (_, shape) in job.modules.items()}
        sizes = {
            name: {bits: scheme.bits_per_weight(inputs[name]) for bits, scheme in of_layer}
            for name, of_layer in choices.items()
        }
        counts = {name: out * wide for name, (_, (out, wide)) in job.modules.items()}
        together = _together(list(job.modules), choices)
        widths = widths_for(losses, sizes, counts, together, config.target_bpw)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(kept, widths)
    if is_main():
        barrier()
    return {
        name: (dict(choices[name])[widths[name]], shape) for name, (_, shape) in job.modules.items()
    }


def _together(names: list[str], choices: Mapping[str, Any]) -> list[list[str]]:
    """Layers of a block that see the same inputs, and may have the same widths."""
    found: dict[Any, list[str]] = {}
    for name in names:
        stage = next(i for i, stage in enumerate(STAGES) if name.endswith(stage))
        block = name.removesuffix(next(end for end in STAGES[stage] if name.endswith(end)))
        found.setdefault((block, stage, tuple(choices[name])), []).append(name)
    return list(found.values())


class _Quantizer:
    """Goes through the blocks; what comes of each stands in `folder`."""

    def __init__(self, config: QuantizeConfig, job: _Job, folder: Path, console: Console) -> None:
        self._config = config
        self._job = job
        self._folder = folder
        self._console = console
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._blocks = Blocks(job.source, job.stored, self._device, job.modules.get)
        self._precision = precision_of(config.precision)
        self._windows = None if job.windows is None else job.windows[rank() :: world_size()]
        count = 0 if self._windows is None else len(self._windows)
        size = config.batch_size
        self._rows = [slice(at, min(at + size, count)) for at in range(0, count, size)]
        self._kinds = ("quantized", "dense") if METHODS[config.method].learned else ("quantized",)

    def run(self) -> None:
        """Every block that is not there yet."""
        self._folder.mkdir(parents=True, exist_ok=True)
        done = _done(self._folder)
        barrier()
        first = len(done)
        start = time.monotonic()
        if first == 0:
            self._embed()
        for index in range(first, len(self._blocks)):
            done.append(self._block(index))
            barrier()  # every process has what the next block wants
            if is_main():
                write_json(self._folder / DONE, {"blocks": done})
            barrier()
            for kind in self._kinds:
                self._path(kind, index).unlink(missing_ok=True)
            self._tell(index, done[-1], (time.monotonic() - start) / (index + 1 - first))

    def _block(self, index: int) -> dict[str, Any]:
        """Quantize a block, and say what has been lost."""
        prefix = self._blocks.name(index)
        schemes = {
            module.removeprefix(prefix): scheme
            for module, (scheme, _) in self._job.modules.items()
            if module.startswith(prefix)
        }
        block = self._blocks.make(index)
        passage = targets = None
        if self._windows is not None:
            passage = self._passage("quantized", index, block)
            if "dense" in self._kinds:
                targets = self._stream("dense", index + 1)
                self._passage("dense", index, block).write(targets)
        result = quantize_block(
            self._config, prefix, block, schemes, self._job.stored, passage, targets
        )
        if passage is not None and index + 1 < len(self._blocks):
            passage.write(self._stream("quantized", index + 1))
        if passage is not None:
            passage.forget()
        tensors = {prefix + name: value for name, value in result.dense.items()}
        for name, tensor in result.layers.items():
            tensors |= code_tensors(prefix + name, tensor)
        whole = {name: value.cpu().contiguous() for name, value in tensors.items()}
        if is_main():
            save_file(whole, self._folder / f"block-{index}.safetensors")
        self._blocks.release(index)
        return result.report

    def _tell(self, index: int, report: dict[str, Any], each: float) -> None:
        count = len(self._blocks)
        told = [f"block {index + 1}/{count}"]
        if "block" in report:
            whole = report["block"]
            told.append(f"error {whole['error_before']:.2%} -> {whole['error']:.2%}")
        elif report:
            name, worst = max(report.items(), key=lambda item: float(item[1]["error"]))
            told.append(f"{name} loses most, {worst['error']:.2%}")
        few = sum(not layer.get("enough", True) for layer in report.values())
        if few:
            told.append(f"{few} layers of experts saw too little text: nearest codes")
        told.append(f"{each * (count - index - 1):.0f} s left")
        self._console.print("  ".join(told), highlight=False)

    def _stream(self, kind: str, index: int) -> Stream:
        assert self._windows is not None
        count, length = self._windows.shape
        return Stream(self._path(kind, index), (count, length, self._blocks.width), _STREAM)

    def _passage(self, kind: str, index: int, block: nn.Module) -> Passage:
        inputs = self._stream(kind, index)
        how = (inputs, self._rows, self._precision, self._folder)
        return Passage(self._blocks, index, block, *how)

    def _path(self, kind: str, index: int) -> Path:
        return self._folder / f"{kind}-{index}-{rank()}.bin"

    def _embed(self) -> None:
        windows = self._windows
        if windows is not None:
            for kind in self._kinds:
                stream = self._stream(kind, 0)
                for rows in self._rows:
                    stream.write(rows, self._blocks.embed(windows[rows]))
            self._blocks.forget_embeddings()


def _done(folder: Path) -> list[dict[str, Any]]:
    """The reports of the blocks that are done."""
    try:
        found = json.loads((folder / DONE).read_text(encoding="utf-8"))["blocks"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if not isinstance(found, list):
        return []
    for index in range(len(found)):
        path = folder / f"block-{index}.safetensors"
        try:
            with safe_open(path, framework="pt"):
                pass
        except Exception as error:  # safetensors has errors of its own
            raise CheckpointError(f"{path} is damaged; --no-resume starts over.") from error
    return found


def _tensors(job: _Job, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Those of the RUN: the blocks' own, and the source's for all else."""
    written: set[str] = set()
    for path in sorted(folder.glob("block-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                written.add(name)
                yield name, file.get_tensor(name)
    for name in job.parts():
        if name not in written:
            yield name, as_stored(name, job.source.dense(name), job.stored)


def _results(config: QuantizeConfig, job: _Job, folder: Path) -> dict[str, Any]:
    layers = {
        f"model.layers.{index}.{name}": errors
        for index, report in enumerate(_done(folder))
        for name, errors in report.items()
        if name != "block"
    }
    blocks = [report["block"] for report in _done(folder) if "block" in report]
    weights = sum(out * inputs for _, (out, inputs) in job.modules.values())
    bits = sum(
        scheme.bits_per_weight(inputs) * out * inputs
        for scheme, (out, inputs) in job.modules.values()
    )
    return {
        "method": config.method,
        "bits_per_weight": bits / weights,
        "tokens": 0 if job.windows is None else job.windows.numel(),
        "seconds": sum(errors["seconds"] for errors in layers.values()),
        "layers": layers,
        **({"blocks": blocks} if blocks else {}),
    }
