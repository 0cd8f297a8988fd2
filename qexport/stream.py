"""Files whose every offset is known before a byte of them is written.

A format plans its files first: the header's bytes and the place of each tensor. What is left is to
put bytes at places, in any order, one tensor at a time; a killed writer goes on where it was.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

__all__ = ["FilePlan", "FileWriter", "as_bytes"]


@dataclass(frozen=True)
class FilePlan:
    """One file: its header, then tensors at fixed places.

    slots  name of a tensor: (offset from the start of the file, length), both in bytes
    size   of the whole file
    """

    name: str
    header: bytes
    slots: dict[str, tuple[int, int]]
    size: int


class FileWriter:
    """Puts tensors at their places in the files of a folder."""

    def __init__(self, folder: Path, plans: list[FilePlan]) -> None:
        self._slots = {
            tensor: (plan.name, *slot) for plan in plans for tensor, slot in plan.slots.items()
        }
        self._files: dict[str, BinaryIO] = {}
        for plan in plans:
            path = folder / plan.name
            file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            self._files[plan.name] = file
            file.truncate(plan.size)  # a file that is there already has this size and header
            _write_all(file, memoryview(plan.header), 0)

    def write(self, name: str, tensor: Tensor) -> int:
        """Write the bytes of a tensor and return their number."""
        file, offset, length = self._slots[name]
        data = as_bytes(tensor)
        if len(data) != length:
            raise AssertionError(f"{name} was planned with {length} bytes and has {len(data)}")
        _write_all(self._files[file], data, offset)
        return length

    def sync(self) -> None:
        """Have the disk hold all that was written so far."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


def _write_all(file: BinaryIO, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):  # one call writes at most 2 GiB
        done += os.pwrite(file.fileno(), data[done:], offset + done)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor, row by row, little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data
