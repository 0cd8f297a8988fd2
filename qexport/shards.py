"""Safetensors folders: one file or several with an index, read lazily, written shard by shard."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qexport.errors import CheckpointError
from qexport.output import write_json

__all__ = ["ShardReader", "ShardWriter"]

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
        handle = self._handle(self._file(name))
        try:
            tensor: Tensor = handle.get_tensor(name)
        except SafetensorError as error:
            raise _damaged(self.folder / self._files[name], error) from error
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
        except (ValueError, KeyError, TypeError) as error:
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


class ShardWriter:
    """Writes tensors into a folder in shards of at most `shard_bytes`, holding one at a time."""

    def __init__(self, folder: Path, shard_bytes: int = 2 << 30) -> None:
        self.folder = folder
        self.total_bytes = 0
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write what is pending, give the shards their final names, and write the index."""
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            part = f"model-{index + 1:05}-of-{count:05}.safetensors"
            final = _SINGLE if count == 1 else part
            self._part(index).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index_json = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / _INDEX, index_json)

    def _flush(self) -> None:
        path = self._part(len(self._shards))
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)
        self._shards.append(list(self._pending))
        self._pending = {}
        self._pending_bytes = 0

    def _part(self, index: int) -> Path:
        return self.folder / f".part-{index}.safetensors"
