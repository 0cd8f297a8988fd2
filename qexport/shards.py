"""Safetensors folders: one file or several with an index, read lazily, written at known places."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qexport.errors import CheckpointError
from qexport.stream import FilePlan

__all__ = ["SHARD_BYTES", "Parts", "ShardReader", "part_bytes", "plan_file", "plan_shards"]

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of tensors by name

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library itself
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
SHARD_BYTES = 4 << 30


class ShardReader:
    """The tensors of a folder by name. Nothing is read before it is asked for.

    Raises CheckpointError for a folder without safetensors, a damaged file, or an index that
    names files that are missing or lie elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._files = self._locate()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        code = self._slice(name).get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(
                f"{self.folder}: {name} has dtype {code}, which qexport does not read."
            )
        return _DTYPES[code]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor. Its file is mapped anew, so that no pages of others stay in memory."""
        path = self.folder / self._file(name)
        try:
            tensor: Tensor = _open(path).get_tensor(name)
        except SafetensorError as error:
            raise _damaged(path, error) from error
        return tensor

    def _file(self, name: str) -> str:
        if name not in self._files:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}; the checkpoint is not whole."
            )
        return self._files[name]

    def _slice(self, name: str) -> Any:
        return self._handle(self._file(name)).get_slice(name)

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            self._handles[file] = _open(self.folder / file)
        return self._handles[file]

    def _locate(self) -> dict[str, str]:
        if (self.folder / _INDEX).is_file() and (self.folder / _SINGLE).is_file():
            raise CheckpointError(
                f"{self.folder} has both {_SINGLE} and {_INDEX}, and readers differ in which they "
                "take; remove the one that is not meant."
            )
        if (self.folder / _INDEX).is_file():
            files = self._read_index()
        elif (self.folder / _SINGLE).is_file():
            files = dict.fromkeys(self._handle(_SINGLE).keys(), _SINGLE)
        else:
            raise _no_safetensors(self.folder)
        return files

    def _read_index(self) -> dict[str, str]:
        path = self.folder / _INDEX
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged; fetch the checkpoint again.") from error
        if not isinstance(files, dict) or not all(_plain_name(file) for file in files.values()):
            raise CheckpointError(f"{path} names files outside its folder; do not trust it.")
        held = {file: set(self._handle(file).keys()) for file in sorted(set(files.values()))}
        for name, file in files.items():
            if name not in held[file]:
                raise CheckpointError(f"{path} promises {name} in {file}, which lacks it.")
        return files


def _plain_name(file: object) -> bool:
    return isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")


def _open(path: Path) -> Any:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; fetch the checkpoint again.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    if len(head) == 8:
        (length,) = struct.unpack("<Q", head)
        if length > min(size - 8, _LARGEST_HEADER):
            raise CheckpointError(
                f"{path} is damaged: its header claims {length} bytes in a file of {size}; "
                "fetch it again."
            )
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: SafetensorError) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged ({error}); fetch it again.")


def _no_safetensors(folder: Path) -> CheckpointError:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} holds only pickle weights ({pickles[0]}), which can run code when read; "
            "convert them to safetensors first."
        )
    return CheckpointError(f"{folder} holds no {_SINGLE}; give the folder of a checkpoint.")


def plan_shards(
    parts: Parts, shard_bytes: int = SHARD_BYTES
) -> tuple[list[FilePlan], dict[str, Any]]:
    """Place tensors in files of at most `shard_bytes`; also the index file as {name: JSON}.

    The files are `model.safetensors`, or numbered shards in the order of `parts` with an index.
    Within a file wide dtypes come first, so that every tensor is aligned to its dtype.
    """
    shards: list[Parts] = [{}]
    filled = 0
    for name, (dtype, shape) in parts.items():
        size = part_bytes((dtype, shape))
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled += size
    count = len(shards)
    if count == 1:
        return [plan_file(_SINGLE, shards[0])], {}
    files = [
        plan_file(f"model-{i + 1:05}-of-{count:05}.safetensors", shard)
        for i, shard in enumerate(shards)
    ]
    total = sum(length for plan in files for _, length in plan.slots.values())
    weight_map = {name: plan.name for plan in files for name in plan.slots}
    return files, {_INDEX: {"metadata": {"total_size": total}, "weight_map": weight_map}}


def plan_file(file: str, shard: Parts) -> FilePlan:
    """One safetensors file of that name; wide dtypes come first in it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places = {}
    offset = 0
    for name in sorted(shard, key=lambda name: (-shard[name][0].itemsize, name)):
        dtype, shape = shard[name]
        size = part_bytes(shard[name])
        span = [offset, offset + size]
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": span}
        places[name] = (offset, size)
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    slots = {name: (start + at, size) for name, (at, size) in places.items()}
    return FilePlan(file, struct.pack("<Q", len(text)) + text, slots, start + offset)


def part_bytes(part: tuple[torch.dtype, tuple[int, ...]]) -> int:
    """Bytes of one tensor in a file."""
    dtype, shape = part
    return math.prod(shape) * dtype.itemsize
