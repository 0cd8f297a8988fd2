"""`Checkpoint`: a model folder as a lazy mapping from names to tensors.

Dense folders, RUNs and ParetoQ's checkpoints are opened by `qexport.source`, packed layouts by
`qexport.formats`: all are of this type. Nothing is read before it is asked for, so that a model
larger than memory streams.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexport.errors import CheckpointError, InputError
from qexport.grid import Grid, Scheme, dtype_name
from qexport.output import marker
from qexport.shards import ShardReader
from qexport.tensor import QuantizedTensor

__all__ = [
    "Checkpoint",
    "Entry",
    "Modules",
    "carried_files",
    "check_codes",
    "check_scales",
    "check_zeros",
    "checked_scales",
    "dense_entry",
    "expect",
    "matrix_shape",
    "module_of",
    "modules_from_json",
    "modules_to_json",
    "quantization_of",
    "read_config",
    "weight_files",
]

CONFIG_VERSION = 1
_CARRIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)


Modules = dict[str, tuple[Scheme, tuple[int, int]]]


@dataclass(frozen=True)
class Entry:
    """One tensor that is not read yet.

    scheme        None for a dense one
    stored_bytes  in the file, scales and all
    stored        what the layout calls it, where that is neither dtype nor grid: a GGUF type
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor | QuantizedTensor]
    scheme: Scheme | None = None
    stored_bytes: int = 0
    stored: str = ""


class Checkpoint(Mapping[str, Tensor | QuantizedTensor]):
    """A model: `checkpoint["…q_proj.weight"]` is a Tensor, or a QuantizedTensor where quantized.

    layout   what the folder holds: `dense`, `run`, `paretoq`, or a format's name
    config   config.json without its quantization_config
    """

    def __init__(
        self, folder: Path, layout: str, config: dict[str, Any], entries: dict[str, Entry]
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.config = {key: v for key, v in config.items() if key != "quantization_config"}
        self.entries = entries
        self.make_tokenizer: Callable[[], Any] | None = None  # where it is not in files beside

    def __getitem__(self, name: str) -> Tensor | QuantizedTensor:
        return self.entries[name].load()

    def __contains__(self, name: object) -> bool:  # a Mapping's own would read the tensor
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def modules(self) -> Modules:
        """Scheme and shape [out, in] of every quantized module, by its name without `.weight`."""
        return {
            module_of(name): (entry.scheme, (entry.shape[0], entry.shape[1]))
            for name, entry in self.entries.items()
            if entry.scheme is not None
        }

    def quantized(self, name: str) -> QuantizedTensor:
        tensor = self[name]
        assert isinstance(tensor, QuantizedTensor)
        return tensor

    def dense(self, name: str) -> Tensor:
        tensor = self[name]
        assert isinstance(tensor, Tensor)
        return tensor

    def carried_files(self) -> list[Path]:
        """As `carried_files` of the folder."""
        return carried_files(self.folder)

    def copy_files(self, target: Path) -> None:
        """Copy the carried files into `target`; a tokenizer that is in none becomes some."""
        if self.make_tokenizer is not None:
            self.make_tokenizer().save_pretrained(target)
        for file in self.carried_files():
            shutil.copyfile(file, target / file.name)


def carried_files(folder: Path) -> list[Path]:
    """Files that go with the weights: tokenizer, chat template, generation config, licence.

    Raises CheckpointError for one that is a link out of the folder, unless the folder is a snapshot
    of the hub's cache and the link leads to its blobs: a packed folder is there to be given away.
    """
    found = sorted({file for pattern in _CARRIED for file in folder.glob(pattern)})
    whole = folder.resolve()
    roots = [whole] if whole.parent.name != "snapshots" else [whole, whole.parent.parent / "blobs"]
    for file in found:
        if not any(file.resolve().is_relative_to(root) for root in roots):
            raise CheckpointError(
                f"{file} is a link out of its folder, to {file.resolve()}; put a copy in its place."
            )
    return [file for file in found if file.is_file()]


def module_of(name: str) -> str:
    """`…q_proj` of `…q_proj.weight`."""
    return name.removesuffix(".weight")


def weight_files(path: Path) -> list[Path]:
    """The files with tensors of a checkpoint, which is a folder or itself a file."""
    if path.is_file():
        return [path]
    return sorted([*path.glob("*.safetensors"), *path.glob("*.gguf")])


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises InputError for no such folder."""
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give a checkpoint's folder, or a GGUF file.")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder, nor a GGUF file; give a checkpoint's folder.")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (marker(folder) or {}).get("status") == "begun":
            raise CheckpointError(
                f"{folder} holds a run that is not finished; give the command that began it again."
            ) from None
        raise CheckpointError(
            f"{folder} has no config.json; give the folder of a Hugging Face checkpoint."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold an object.")
    return config


def quantization_of(path: Path) -> dict[str, Any] | None:
    """The quantization_config of a folder, or None where there is no readable one."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        found = config["quantization_config"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def dense_entry(reader: ShardReader, name: str) -> Entry:
    """The entry of a tensor that is stored as it is."""
    shape, dtype = reader.shape(name), reader.dtype(name)
    size = math.prod(shape) * dtype.itemsize
    return Entry(shape, dtype, partial(reader.tensor, name), None, size)


def modules_to_json(modules: Modules) -> list[dict[str, Any]]:
    """`config_groups` of config.json: every scheme with the modules that have it."""
    groups: dict[Scheme, dict[str, list[int]]] = {}
    for module, (scheme, shape) in modules.items():
        groups.setdefault(scheme, {})[module] = list(shape)
    return [{**scheme.to_json(), "modules": names} for scheme, names in groups.items()]


def modules_from_json(quantization: dict[str, Any]) -> Modules:
    """Undo `modules_to_json`. Raises CheckpointError for a form that this version cannot read."""
    groups = quantization.get("config_groups")
    if quantization.get("version") != CONFIG_VERSION or not isinstance(groups, list):
        raise CheckpointError(
            f"quantization_config has version {quantization.get('version')!r}, and this qexport "
            f"reads {CONFIG_VERSION}; upgrade it or write the checkpoint again."
        )
    modules: Modules = {}
    for group in groups:
        named = group.get("modules") if isinstance(group, dict) else None
        if not isinstance(named, dict) or not all(_is_shape(shape) for shape in named.values()):
            raise CheckpointError(
                "quantization_config has a group without modules and their [out, in] shapes."
            )
        scheme = Scheme.from_json(group)
        for module, (out, inputs) in named.items():
            try:
                scheme.groups(inputs)
            except ValueError as error:
                raise CheckpointError(f"quantization_config: {error} of {module}.") from error
            modules[module] = (scheme, (out, inputs))
    return modules


def expect(reader: ShardReader, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the file's tensor `name` has this dtype and shape."""
    found = reader.dtype(name), reader.shape(name)
    if found != (dtype, shape):
        raise CheckpointError(
            f"{reader.folder}: {name} is {dtype_name(found[0])} {found[1]}, and its scheme wants "
            f"{dtype_name(dtype)} {shape}."
        )


def checked_scales(reader: ShardReader, name: str) -> Tensor:
    """The scales `name`, or CheckpointError if one is zero or not finite.

    Negative ones are in order: llama.cpp's quantizers write them, and GGUF files are re-packed.
    """
    scales = reader.tensor(name)
    check_scales(scales, f"{reader.folder}: {name}")
    return scales


def check_scales(scales: Tensor, where: str) -> None:
    """Raise CheckpointError as `checked_scales` does."""
    if not bool((scales != 0).all()) or not bool(scales.isfinite().all()):
        raise CheckpointError(
            f"{where} holds a scale that is zero or not finite; the file is damaged, or its "
            "training diverged."
        )


def check_codes(codes: Tensor, grid: Grid, where: str) -> None:
    """Raise CheckpointError for a code that the grid does not have."""
    if int(codes.max()) >= grid.levels:
        raise CheckpointError(
            f"{where} holds code {int(codes.max())}, and {grid.name} has {grid.levels} levels; the "
            "file is damaged."
        )


def check_zeros(zeros: Tensor, grid: Grid, where: str) -> None:
    """Raise CheckpointError for a zero point that is none of the grid's codes."""
    if int(zeros.max()) >= grid.levels:
        raise CheckpointError(
            f"{where} holds zero point {int(zeros.max())}, and {grid.name} has {grid.levels} "
            "levels; the file is damaged."
        )


def checked_minima(reader: ShardReader, name: str) -> Tensor:
    """The minima `name`, or CheckpointError if one is not finite."""
    minima = reader.tensor(name)
    if not bool(minima.isfinite().all()):
        raise CheckpointError(
            f"{reader.folder}: {name} holds a minimum that is not finite; the file is damaged."
        )
    return minima


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(n) is int and 0 < n < 2**31 for n in value)
    )


def matrix_shape(reader: ShardReader, name: str) -> tuple[int, int]:
    """[out, in], or CheckpointError for a tensor that is no matrix."""
    shape = reader.shape(name)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{reader.folder}: {name} is not a matrix but {shape}.")
    return shape[0], shape[1]
