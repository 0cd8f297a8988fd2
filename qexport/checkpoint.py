"""`Checkpoint`: a model folder as a lazy mapping from names to tensors.

Opened here are the folders that training starts from and ends with: a dense Hugging Face
checkpoint, a RUN of ours (latent weights and scales, or codes and scales), and an upstream ParetoQ
checkpoint (latent weights and `weight_clip_val`). Packed layouts are opened by `qexport.formats`,
which builds the same type. Nothing is read before it is asked for, so that a model larger than
memory streams.
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
from qexport.grid import Scheme, dtype_name
from qexport.paretoq import WIDTHS, from_upstream, upstream_scale
from qexport.shards import Parts, ShardReader
from qexport.tensor import QuantizedTensor, portable, quantize

__all__ = [
    "Checkpoint",
    "Entry",
    "Modules",
    "checked_scales",
    "code_parts",
    "code_tensors",
    "dense_entry",
    "expect",
    "module_of",
    "modules_from_json",
    "modules_to_json",
    "open_source",
    "quantization_of",
    "read_config",
    "weight_files",
]

CONFIG_VERSION = 1
SCALE_SUFFIX = ".weight_scale"
ZERO_SUFFIX = ".weight_zero_point"
MINIMUM_SUFFIX = ".weight_minimum"
_UPSTREAM_SUFFIX = ".weight_clip_val"
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
        """Files that go with the weights: tokenizer, chat template, generation config, licence."""
        found = {file for pattern in _CARRIED for file in self.folder.glob(pattern)}
        return sorted(file for file in found if file.is_file())

    def copy_files(self, target: Path) -> None:
        """Copy the carried files into `target`; a tokenizer that is in none becomes some."""
        if self.make_tokenizer is not None:
            self.make_tokenizer().save_pretrained(target)
        for file in self.carried_files():
            shutil.copyfile(file, target / file.name)


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


def open_source(folder: Path) -> Checkpoint | None:
    """Open a dense checkpoint, a RUN or an upstream ParetoQ checkpoint; None if it is packed."""
    config = read_config(folder)
    quantization = config.get("quantization_config")
    if quantization is not None:
        if not isinstance(quantization, dict):
            raise CheckpointError(f"{folder}/config.json: quantization_config is not an object.")
        form = quantization.get("format")
        if quantization.get("quant_method") != "qexport" or form not in ("latent", "codes"):
            return None
        reader = ShardReader(folder)
        entries = _run_entries if form == "latent" else _code_entries
        return Checkpoint(folder, "run", config, entries(reader, quantization))
    reader = ShardReader(folder)
    if any(name.endswith(_UPSTREAM_SUFFIX) for name in reader):
        return Checkpoint(folder, "paretoq", config, _upstream_entries(reader, config))
    return Checkpoint(folder, "dense", config, {n: dense_entry(reader, n) for n in reader})


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
    if not bool((scales != 0).all()) or not bool(scales.isfinite().all()):
        raise CheckpointError(
            f"{reader.folder}: {name} holds a scale that is zero or not finite; the file is "
            "damaged, or its training diverged."
        )
    return scales


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


def _matrix_shape(reader: ShardReader, name: str) -> tuple[int, int]:
    shape = reader.shape(name)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{reader.folder}: {name} is not a matrix but {shape}.")
    return shape[0], shape[1]


def _run_entries(reader: ShardReader, quantization: dict[str, Any]) -> dict[str, Entry]:
    modules = modules_from_json(quantization)
    scales = {module + SCALE_SUFFIX for module in modules}
    entries = {name: dense_entry(reader, name) for name in reader if name not in scales}
    for module, (scheme, shape) in modules.items():
        scales_shape = (shape[0], scheme.groups(shape[1]))
        expect(reader, f"{module}.weight", torch.float32, shape)
        expect(reader, module + SCALE_SUFFIX, scheme.scale_dtype, scales_shape)
        load = partial(_load_latent, reader, module, scheme)
        size = 4 * shape[0] * shape[1] + scheme.scale_dtype.itemsize * math.prod(scales_shape)
        entries[f"{module}.weight"] = Entry(shape, torch.float32, load, scheme, size)
    return entries


def _load_latent(reader: ShardReader, module: str, scheme: Scheme) -> QuantizedTensor:
    weight = reader.tensor(f"{module}.weight")
    scale = checked_scales(reader, module + SCALE_SUFFIX).float()
    if not bool((scale > 0).all()):
        raise CheckpointError(
            f"{reader.folder}: {module} holds a negative scale; its training diverged."
        )
    if not bool(weight.isfinite().all()):
        raise CheckpointError(
            f"{reader.folder}: {module} holds a NaN or an infinity; its training diverged."
        )
    return quantize(weight, scale, scheme)


def _code_entries(reader: ShardReader, quantization: dict[str, Any]) -> dict[str, Entry]:
    modules = modules_from_json(quantization)
    suffixes = (SCALE_SUFFIX, ZERO_SUFFIX, MINIMUM_SUFFIX)
    theirs = {module + suffix for module in modules for suffix in suffixes}
    entries = {name: dense_entry(reader, name) for name in reader if name not in theirs}
    for module, (scheme, shape) in modules.items():
        size = 0
        for name, (dtype, part) in code_parts(module, scheme, shape).items():
            expect(reader, name, dtype, part)
            size += dtype.itemsize * math.prod(part)
        load = partial(_load_codes, reader, module, scheme)
        entries[f"{module}.weight"] = Entry(shape, scheme.scale_dtype, load, scheme, size)
    return entries


def code_parts(module: str, scheme: Scheme, shape: tuple[int, int]) -> Parts:
    """Dtypes and shapes of what a RUN of codes holds of a module."""
    groups = (shape[0], scheme.groups(shape[1]))
    parts: Parts = {
        f"{module}.weight": (torch.uint8, shape),
        module + SCALE_SUFFIX: (scheme.scale_dtype, groups),
    }
    if scheme.grid.zeros:
        parts[module + ZERO_SUFFIX] = torch.uint8, groups
    if scheme.grid.minima:
        parts[module + MINIMUM_SUFFIX] = torch.float32, groups
    return parts


def code_tensors(module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """What `code_parts` promises."""
    found = {f"{module}.weight": tensor.codes, module + SCALE_SUFFIX: tensor.scales}
    if tensor.zeros is not None:
        found[module + ZERO_SUFFIX] = tensor.zeros
    if tensor.minima is not None:
        found[module + MINIMUM_SUFFIX] = tensor.minima
    return found


def _load_codes(reader: ShardReader, module: str, scheme: Scheme) -> QuantizedTensor:
    codes = reader.tensor(f"{module}.weight")
    if int(codes.max()) >= scheme.grid.levels:
        raise CheckpointError(
            f"{reader.folder}: {module} holds code {int(codes.max())}, and {scheme.grid.name} has "
            f"{scheme.grid.levels} levels; the file is damaged."
        )
    zeros = reader.tensor(module + ZERO_SUFFIX) if scheme.grid.zeros else None
    minima = checked_minima(reader, module + MINIMUM_SUFFIX) if scheme.grid.minima else None
    scales = checked_scales(reader, module + SCALE_SUFFIX)
    return QuantizedTensor(codes, scales, scheme, zeros, minima)


def _upstream_entries(reader: ShardReader, config: dict[str, Any]) -> dict[str, Entry]:
    width = config.get("w_bits")
    bits = "1.58" if width == 0 else str(width)
    if bits not in WIDTHS:
        raise CheckpointError(
            f"{reader.folder} has weight_clip_val tensors but w_bits {config.get('w_bits')!r} in "
            "config.json; ParetoQ's are 0 (1.58 bits), 1, 2, 3 and 4."
        )
    entries = {}
    for name in reader:
        clip = module_of(name) + _UPSTREAM_SUFFIX
        if name.endswith(".weight") and clip in reader:
            shape = _matrix_shape(reader, name)
            scheme = _upstream_scheme(reader, clip, shape, bits)
            load = partial(_load_upstream, reader, module_of(name), scheme)
            entries[name] = Entry(shape, reader.dtype(name), load, scheme)
        elif not name.endswith(_UPSTREAM_SUFFIX):
            entries[name] = dense_entry(reader, name)
    return entries


def _upstream_scheme(reader: ShardReader, clip: str, shape: tuple[int, int], bits: str) -> Scheme:
    out, *groups = reader.shape(clip)
    count = groups[0] if groups else 1
    if out != shape[0] or count == 0 or shape[1] % count or groups[1:] not in ([], [1]):
        raise CheckpointError(f"{reader.folder}: {clip} has shape {reader.shape(clip)}.")
    group_size = None if count == 1 else shape[1] // count
    if reader.dtype(clip) not in (torch.float16, torch.bfloat16, torch.float32):
        raise CheckpointError(f"{reader.folder}: {clip} has dtype {reader.dtype(clip)}.")
    scale = upstream_scale(reader.tensor(clip), WIDTHS[bits])
    is_portable = torch.equal(portable(scale.float()), scale.float())
    dtype = torch.float16 if is_portable else scale.dtype
    return Scheme(WIDTHS[bits].grid, group_size, dtype)


def _load_upstream(reader: ShardReader, module: str, scheme: Scheme) -> QuantizedTensor:
    weight = reader.tensor(f"{module}.weight")
    clip = reader.tensor(module + _UPSTREAM_SUFFIX)
    return from_upstream(weight, clip.reshape(clip.shape[0], -1), scheme)
