"""What a block type of GGUF is, and the bytes all of them are made of.

A block holds `size` consecutive weights of a row in `bytes` bytes. Nothing is quantized here: a
block takes codes that are there, and is offered only for grids (`holds`) whose values it keeps to
the bit. Codes are moved eight at a time, as int64: in most types weight j and weight j + m share a
byte.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexport.grid import Grid

__all__ = [
    "Block",
    "Decoded",
    "filled",
    "floats",
    "half",
    "halves",
    "no_negative",
    "planes",
    "rows",
    "unplanes",
]


@dataclass(frozen=True)
class Decoded:
    """What a tensor's blocks say: `step * (code - zero)`, or `step * code - minimum`.

    codes    uint8 [out, in]
    step     float32 [out, in / sub], one for every `sub` weights of a row
    zero     of all codes, where the type is symmetric
    minimum  float32 like `step`, where it is not
    values   of a codebook, where the type has one: `step * values[code]`
    """

    codes: Tensor
    step: Tensor
    zero: float | None = None
    minimum: Tensor | None = None
    values: tuple[float, ...] | None = None

    def weights(self) -> Tensor:
        """float32 [out, in], in the order of operations of ggml."""
        if self.values is not None:
            book = torch.tensor(self.values)[self.codes.to(torch.int32)]
            values = book.view(*self.step.shape, -1) * self.step.unsqueeze(-1)
            return values.view(self.codes.shape)
        codes = self.codes.float().view(*self.step.shape, -1)
        if self.minimum is None:
            assert self.zero is not None
            values = (codes - self.zero) * self.step.unsqueeze(-1)
        else:
            values = codes * self.step.unsqueeze(-1) - self.minimum.unsqueeze(-1)
        return values.view(self.codes.shape)


class Block(ABC):
    """A type. `file_type` is llama.cpp's number for a file that is mostly of it.

    sub      weights that one step applies to when reading
    holds    grids that `encode` takes
    natural  the grid of files that others wrote, where one step and a constant zero say it all
    """

    name: ClassVar[str]
    id: ClassVar[int]
    file_type: ClassVar[int]
    size: ClassVar[int]
    bytes: ClassVar[int]
    sub: ClassVar[int]
    holds: ClassVar[tuple[Grid, ...]]
    natural: ClassVar[Grid | None]

    @abstractmethod
    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Bytes [out, blocks, bytes] of codes [out, blocks, size]; scales float16 [out, blocks]."""

    @abstractmethod
    def decode(self, raw: Tensor) -> Decoded:
        """Undo `encode`, for blocks uint8 [out, blocks, bytes] from anywhere."""

    @property
    def bits_per_weight(self) -> float:
        return self.bytes * 8 / self.size

    @property
    def width(self) -> int:
        """Bits of the codes."""
        return self.holds[0].bits


def half(scales: Tensor) -> Tensor:
    """float16 scales halved. Raises ValueError where that loses a bit."""
    halves = scales / 2
    if not torch.equal(halves * 2, scales):
        raise ValueError("a scale is too small to be halved exactly")
    return halves


def planes(codes: Tensor, width: int) -> Tensor:
    """uint8 [..., p, m] as bytes [..., m]: plane j stands at bit j * width."""
    lanes = _lanes(codes)
    packed = lanes[..., 0, :].clone()
    for j in range(1, codes.shape[-2]):
        packed |= lanes[..., j, :] << (j * width)
    return packed.view(torch.uint8)


def unplanes(packed: Tensor, width: int, planes: int) -> Tensor:
    """Undo `planes`: bytes [..., m] to uint8 [..., planes, m]."""
    lanes = _lanes(packed)
    mask = int.from_bytes(bytes([(1 << width) - 1] * 8), "little")
    parts = [(lanes >> (j * width)) & mask for j in range(planes)]
    return torch.stack(parts, dim=-2).view(torch.uint8)


def _lanes(values: Tensor) -> Tensor:
    """uint8 [..., m] as int64 [..., m / 8], copied where its memory is not aligned for that."""
    flat = values.reshape(-1)
    if flat.storage_offset() % 8 or not flat.is_contiguous():
        flat = flat.clone()
    return flat.view(torch.int64).view(*values.shape[:-1], values.shape[-1] // 8)


def no_negative(scales: Tensor) -> None:
    """A negative step and a minimum make zeros of the other sign."""
    if bool((scales < 0).any()):
        raise ValueError("a negative scale does not go with a minimum to the bit")


def halves(values: Tensor) -> Tensor:
    """float16 [...] as bytes [..., 2]. Raises ValueError beyond its range."""
    if not bool(values.to(torch.float16).isfinite().all()):
        raise ValueError("a scale is beyond the range of float16")
    return values.to(torch.float16).contiguous().unsqueeze(-1).view(torch.uint8)


def floats(raw: Tensor) -> Tensor:
    """Undo `halves`, to float32."""
    return raw.contiguous().view(torch.float16).squeeze(-1).float()


def filled(like: Tensor, value: int, count: int) -> Tensor:
    """`count` equal bytes for every block: uint8 [out, blocks, count]."""
    return torch.full((*like.shape[:2], count), value, dtype=torch.uint8)


def rows(blocks: Tensor) -> Tensor:
    """[out, blocks, size, ...] as [out, in, ...]."""
    return blocks.reshape(blocks.shape[0], -1)
