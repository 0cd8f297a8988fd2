"""`FolderFormat`: a layout of safetensors with a `quantization_config` in config.json.

Such a layout is said once, by `parts`: the names, dtypes and shapes of a module's tensors. Reading
checks files against it, writing plans files by it, and sizes are counted from it.
"""

import json
from abc import abstractmethod
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.checkpoint import (
    Checkpoint,
    Entry,
    Modules,
    dense_entry,
    expect,
    module_of,
    quantization_of,
    read_config,
)
from qexport.errors import CheckpointError, RefusedError
from qexport.formats.base import (
    Format,
    Layout,
    Options,
    Plan,
    ReadBack,
    Verdict,
    holds_scales,
)
from qexport.grid import Scheme, dtype_name
from qexport.shards import Parts, ShardReader, part_bytes, plan_shards
from qexport.tensor import QuantizedTensor

__all__ = ["FolderFormat", "dense_linears", "group_size_of", "single_scheme"]


class FolderFormat(Format):
    """A Hugging Face folder. Subclasses say what stands in it."""

    scale_dtypes: ClassVar[tuple[torch.dtype, ...]]  # the first is what others are rounded to
    tells_shares: ClassVar[bool] = False  # whether files say that scales are multiples of one

    @abstractmethod
    def describes(self, quantization: dict[str, Any]) -> bool:
        """Whether a quantization_config is of this layout."""

    @abstractmethod
    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] on one of `grids` cannot be stored as it is, or None."""

    @abstractmethod
    def parts(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Parts:
        """The tensors of a module in the file: dtype and shape by name."""

    @abstractmethod
    def encode_parts(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors that `parts` promises."""

    @abstractmethod
    def decode(
        self, reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Undo `encode_parts`, from a file whose tensors have been checked against `parts`."""

    @abstractmethod
    def quantization_config(self, modules: Modules, source: Checkpoint) -> dict[str, Any]:
        """What config.json says of the modules. Raises RefusedError if it cannot say it."""

    @abstractmethod
    def modules(self, reader: ShardReader, quantization: dict[str, Any]) -> Modules:
        """Scheme and shape of every module in a file. Raises CheckpointError on nonsense."""

    def file_parts(
        self, reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> Parts:
        """What a file may have in place of `parts`, where layouts have changed over time."""
        return self.parts(module, scheme, shape)

    def side_files(self, quantization: dict[str, Any]) -> dict[str, Any]:
        """JSON files that the layout wants beside config.json."""
        return {}

    def detect(self, path: Path) -> bool:
        quantization = quantization_of(path)
        return quantization is not None and self.describes(quantization)

    def read(self, path: Path) -> Checkpoint:
        config = read_config(path)
        reader = ShardReader(path)
        entries: dict[str, Entry] = {}
        taken: set[str] = set()
        for module, (scheme, shape) in self.modules(reader, config["quantization_config"]).items():
            parts = self.file_parts(reader, module, scheme, shape)
            for name, (dtype, sides) in parts.items():
                expect(reader, name, dtype, sides)
            taken.update(parts)
            entries[f"{module}.weight"] = Entry(
                shape,
                scheme.scale_dtype,
                partial(self.decode, reader, module, scheme, shape),
                scheme,
                sum(map(part_bytes, parts.values())),
            )
        for name in reader:
            if name in taken:
                continue
            if name in entries:  # which of the two an engine would take is not known
                raise CheckpointError(
                    f"{path} has {name} dense and quantized; remove the one that is not meant."
                )
            entries[name] = dense_entry(reader, name)
        return Checkpoint(path, self.name, config, entries)

    def differences(self, source: Checkpoint, artefact: Checkpoint) -> list[str]:
        """Words of quantization_config that are not those which `quantization_config` would say."""
        held = artefact.modules
        modules = {module: held[module] for module in source.modules if module in held}
        try:
            expected = self.quantization_config(modules, source)
        except RefusedError:
            return ["config.json (quantization_config)"]
        found = _unlike("config.json", quantization_of(artefact.folder), expected)
        for name, content in self.side_files(expected).items():
            try:
                value = json.loads((artefact.folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                value = None
            found += _unlike(name, value, content)
        return found

    def verdict(self, scheme: Scheme, shape: tuple[int, int], options: Options) -> Verdict:
        if not any(scheme.grid.factor_into(grid) for grid in self.grids):
            return Verdict(None, reason=self._no_grid(scheme, options.bits))
        exact = any(holds_scales(dtype, scheme.scale_dtype) for dtype in self.scale_dtypes)
        if not exact and not options.allow_lossy:
            mine = dtype_name(self.scale_dtypes[0])
            return Verdict(
                None,
                reason=f"{self.name} stores {mine} scales, and these are "
                f"{dtype_name(scheme.scale_dtype)} values that {mine} does not hold "
                "(--allow-lossy rounds them)",
            )
        kept = scheme.scale_dtype in self.scale_dtypes
        scale_dtype = scheme.scale_dtype if kept else self.scale_dtypes[0]
        reason = self._no_grid(scheme, options.bits)
        for grid in self.grids:
            if options.bits not in (None, grid.bits) or not scheme.grid.factor_into(grid):
                continue
            holder = Scheme(grid, scheme.group_size, scale_dtype)
            if self.tells_shares and kept and grid == scheme.grid:
                holder = scheme
            refusal = self.refuses(holder, shape)
            if refusal is None:
                size = sum(map(part_bytes, self.parts("", holder, shape).values()))
                width = size * 8 / (shape[0] * shape[1])
                return Verdict(holder, grid.name, None, width, 0.0 if exact else 1.0)
            reason = refusal
        return Verdict(None, reason=reason)

    def layout(self, source: Checkpoint, plan: Plan, options: Options) -> Layout:
        modules: Modules = {}
        stored: Parts = {}
        for name, entry in source.entries.items():
            mine: Parts = {name: (entry.dtype, entry.shape)}
            verdict = plan.get(module_of(name)) if entry.scheme else None
            if verdict is not None and verdict.holder is not None:
                shape = (entry.shape[0], entry.shape[1])
                modules[module_of(name)] = verdict.holder, shape
                mine = self.parts(module_of(name), verdict.holder, shape)
            stored.update(mine)
        quantization = self.quantization_config(modules, source)
        files, index = plan_shards(stored)
        side = {
            "config.json": {**source.config, "quantization_config": quantization},
            **self.side_files(quantization),
            **index,
        }
        return Layout(files, side, {}, self._encode, self._reopen)

    def _encode(
        self, name: str, tensor: Tensor | QuantizedTensor, verdict: Verdict | None
    ) -> dict[str, Tensor]:
        if isinstance(tensor, QuantizedTensor):
            if bool((tensor.scales == 0).any()):
                raise RefusedError(
                    f"{module_of(name)} has groups of scale zero, as llama.cpp writes for blocks "
                    f"of zeros; readers of {self.name} take that for damage, and gguf holds it."
                )
            try:
                return self.encode_parts(module_of(name), tensor)
            except ValueError as error:
                raise RefusedError(f"{module_of(name)}: {error}.") from error
        return {name: tensor}

    def _reopen(self, folder: Path) -> ReadBack:
        reader = ShardReader(folder)

        def read_back(name: str, entry: Entry, verdict: Verdict | None) -> Tensor | QuantizedTensor:
            if verdict is None or verdict.holder is None:
                return reader.tensor(name)
            shape = (entry.shape[0], entry.shape[1])
            return self.decode(reader, module_of(name), verdict.holder, shape)

        return read_back

    def _no_grid(self, scheme: Scheme, bits: int | None) -> str:
        width = "" if bits is None else f" at {bits} bits"
        zero = scheme.grid.zero
        half = zero is not None and zero % 1 != 0
        why = f", whose zero point {zero} is not an integer" if half else ""
        holders = sorted({g.bits for g in self.grids if scheme.grid.factor_into(g)})
        instead = f"; {' or '.join(map(str, holders))} bits would" if holders else ""
        return f"{self.name}{width} has no grid that holds {scheme.grid.name}{why}{instead}"


def _unlike(file: str, found: object, expected: dict[str, Any]) -> list[str]:
    """The keys that differ; `meta` says who wrote a file and nothing of what is in it."""
    if not isinstance(found, dict):
        return [file]
    keys = sorted({*found, *expected} - {"meta"})
    return [f"{file} ({key})" for key in keys if found.get(key) != expected.get(key)]


def dense_linears(source: Checkpoint) -> list[str]:
    """Modules with a dense matrix, the embedding aside: those that engines must not convert.

    `lm_head` is always among them unless quantized: where it is tied it has no tensor of its own.
    """
    modules = source.modules
    found = [
        module_of(name)
        for name, entry in source.entries.items()
        if entry.scheme is None and len(entry.shape) == 2 and name.endswith(".weight")
    ]
    named = [module for module in found if "embed" not in module and module != "lm_head"]
    return named if "lm_head" in modules else ["lm_head", *named]


def single_scheme(form: Format, modules: Modules) -> Scheme:
    """The one scheme of all modules, for layouts whose config has room for one."""
    schemes = {scheme for scheme, _ in modules.values()}
    if len(schemes) != 1:
        raise RefusedError(
            f"{form.name} is written with one width and group size for the whole model, and this "
            f"run has {len(schemes)} schemes; {_wider(form, schemes)}native holds them, and "
            "compressed-tensors and gguf have room for several."
        )
    return schemes.pop()


def _wider(form: Format, schemes: set[Scheme]) -> str:
    """What to ask for, where schemes differ in their grids alone and a wide one holds all."""
    if len({replace(scheme, grid=form.grids[0]) for scheme in schemes}) > 1:
        return ""
    for grid in form.grids:
        if all(scheme.grid.factor_into(grid) for scheme in schemes):
            return f"--bits {grid.bits} holds them all, "
    return ""


def group_size_of(
    reader: ShardReader, module: str, inputs: int, groups: int, stated: object
) -> int | None:
    """The group size that the tensors show, None per channel; it must be what the config says.

    `stated` is the config's word: None where it has none, 0 or less for per channel.
    """
    if not groups or inputs % groups:
        raise CheckpointError(f"{reader.folder}: {module} has {groups} groups of {inputs} inputs.")
    size = inputs // groups
    if stated is not None:
        said = stated if type(stated) is int and stated > 0 else inputs
        if type(stated) is not int or said != size:
            raise CheckpointError(
                f"{reader.folder}: config.json says groups of {stated!r}, and {module} has "
                f"{groups} groups in {inputs} inputs."
            )
    return None if groups == 1 and stated != inputs else size
