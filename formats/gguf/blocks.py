"""The block types of GGUF: a codec for each, from codes and scales to bytes and back.

A block holds `size` consecutive weights of a row in `bytes` bytes. Layouts are those of ggml
(ggml-common.h, ggml-quants.c). Nothing is quantized here: a block takes codes that are there, and
is offered only for grids (`holds`) whose values it keeps to the bit.

Codes are moved eight at a time, as int64: in most types weight j and weight j + m share a byte.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexport import bits
from qexport.grid import (
    BINARY,
    INT2,
    INT3,
    INT4,
    INT5,
    INT6,
    INT8,
    SEQ2,
    SUPER_BLOCKS,
    TERNARY,
    UINT2,
    UINT4,
    Grid,
)
from qexport.tensor import factors

__all__ = ["BLOCKS", "BY_ID", "Q6_K", "Block", "Decoded"]


@dataclass(frozen=True)
class Decoded:
    """What a tensor's blocks say: `step * (code - zero)`, or `step * code - minimum`.

    codes    uint8 [out, in]
    step     float32 [out, in / sub], one for every `sub` weights of a row
    zero     of all codes, where the type is symmetric
    minimum  float32 like `step`, where it is not
    """

    codes: Tensor
    step: Tensor
    zero: float | None = None
    minimum: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 [out, in], in the order of operations of ggml."""
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


def _half(scales: Tensor) -> Tensor:
    """float16 scales halved. Raises ValueError where that loses a bit."""
    halves = scales / 2
    if not torch.equal(halves * 2, scales):
        raise ValueError("a scale is too small to be halved exactly")
    return halves


def _planes(codes: Tensor, width: int) -> Tensor:
    """uint8 [..., p, m] as bytes [..., m]: plane j stands at bit j * width."""
    lanes = _lanes(codes)
    packed = lanes[..., 0, :].clone()
    for j in range(1, codes.shape[-2]):
        packed |= lanes[..., j, :] << (j * width)
    return packed.view(torch.uint8)


def _unplanes(packed: Tensor, width: int, planes: int) -> Tensor:
    """Undo `_planes`: bytes [..., m] to uint8 [..., planes, m]."""
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


def _no_negative(scales: Tensor) -> None:
    """A negative step and a minimum make zeros of the other sign."""
    if bool((scales < 0).any()):
        raise ValueError("a negative scale does not go with a minimum to the bit")


def _halves(values: Tensor) -> Tensor:
    """float16 [...] as bytes [..., 2]. Raises ValueError beyond its range."""
    if not bool(values.to(torch.float16).isfinite().all()):
        raise ValueError("a scale is beyond the range of float16")
    return values.to(torch.float16).contiguous().unsqueeze(-1).view(torch.uint8)


def _floats(raw: Tensor) -> Tensor:
    """Undo `_halves`, to float32."""
    return raw.contiguous().view(torch.float16).squeeze(-1).float()


def _filled(like: Tensor, value: int, count: int) -> Tensor:
    return torch.full((*like.shape[:2], count), value, dtype=torch.uint8)


def _rows(blocks: Tensor) -> Tensor:
    """[out, blocks, size, ...] as [out, in, ...]."""
    return blocks.reshape(blocks.shape[0], -1)


class Q1_0(Block):
    name, id, file_type, size, bytes, sub = "Q1_0", 41, 40, 128, 18, 128
    holds, natural = (BINARY,), BINARY

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        out, blocks, _ = codes.shape
        stream = bits.pack(codes.view(-1, self.size), 1).view(out, blocks, -1)
        return torch.cat((_halves(_half(scales)), stream), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        stream = raw[..., 2:].reshape(-1, 16)
        codes = bits.unpack(stream, 1, self.size).view(raw.shape[0], -1)
        return Decoded(codes, _floats(raw[..., :2]) * 2, 0.5)


class Q2_0(Block):
    name, id, file_type, size, bytes, sub = "Q2_0", 42, 41, 64, 18, 64
    holds, natural = (TERNARY,), UINT2

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        out, blocks, _ = codes.shape
        stream = bits.pack(codes.view(-1, self.size), 2).view(out, blocks, -1)
        return torch.cat((_halves(scales), stream), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        stream = raw[..., 2:].reshape(-1, 16)
        codes = bits.unpack(stream, 2, self.size).view(raw.shape[0], -1)
        return Decoded(codes, _floats(raw[..., :2]), 1.0)


class TQ1_0(Block):
    """Five base-3 digits a byte, as the byte's fraction of 243 rounded up."""

    name, id, file_type, size, bytes, sub = "TQ1_0", 34, 36, 256, 54, 256
    holds, natural = (TERNARY,), TERNARY
    _runs = ((0, 160, 32, 5), (160, 240, 16, 5), (240, 256, 4, 4))  # from, to, bytes, digits

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        parts = []
        for first, last, width, digits in self._runs:
            run = codes[..., first:last].reshape(*codes.shape[:2], digits, width).to(torch.int32)
            powers = torch.tensor([3 ** (4 - n) for n in range(digits)], dtype=torch.int32)
            number = (run * powers[:, None]).sum(-2)
            parts.append(((number * 256 + 242) // 243).to(torch.uint8))
        return torch.cat((*parts, _halves(scales)), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        parts = []
        at = 0
        for _, _, width, digits in self._runs:
            run = raw[..., at : at + width].to(torch.int32)
            at += width
            found = [((run * 3**n & 0xFF) * 3) >> 8 for n in range(digits)]
            parts.append(torch.stack(found, dim=-2).to(torch.uint8).flatten(-2))
        return Decoded(_rows(torch.cat(parts, dim=-1)), _floats(raw[..., 52:]), 1.0)


class TQ2_0(Block):
    name, id, file_type, size, bytes, sub = "TQ2_0", 35, 37, 256, 66, 256
    holds, natural = (TERNARY,), TERNARY

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        stream = _planes(codes.reshape(*codes.shape[:2], 2, 4, 32), 2).flatten(-2)
        return torch.cat((stream, _halves(scales)), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        stream = raw[..., :64].reshape(*raw.shape[:2], 2, 32)
        return Decoded(_rows(_unplanes(stream, 2, 4)), _floats(raw[..., 64:]), 1.0)


class Q4_0(Block):
    name, id, file_type, size, bytes, sub = "Q4_0", 2, 2, 32, 18, 32
    holds, natural = (INT4,), INT4

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        stream = _planes(codes.reshape(*codes.shape[:2], 2, 16), 4)
        return torch.cat((_halves(scales), stream), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        return Decoded(_rows(_unplanes(raw[..., 2:], 4, 2)), _floats(raw[..., :2]), 8.0)


class Q4_1(Block):
    """Keeps a minimum as a float16: exact for the symmetric grid, rounded for zero points."""

    name, id, file_type, size, bytes, sub = "Q4_1", 3, 3, 32, 20, 32
    holds, natural = (INT4,), None

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        _no_negative(scales)
        zero = grid.middle if zeros is None else zeros.float()
        minimum = (scales.float() * -zero).to(torch.float16)
        if not bool(minimum.isfinite().all()):
            raise ValueError("a scale is too large for a float16 minimum")
        stream = _planes(codes.reshape(*codes.shape[:2], 2, 16), 4)
        return torch.cat((_halves(scales), _halves(minimum), stream), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        codes = _rows(_unplanes(raw[..., 4:], 4, 2))
        return Decoded(codes, _floats(raw[..., :2]), None, -_floats(raw[..., 2:4]))


class Q5_0(Block):
    name, id, file_type, size, bytes, sub = "Q5_0", 6, 8, 32, 22, 32
    holds, natural = (INT5,), INT5

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        out, blocks, _ = codes.shape
        high = bits.pack((codes >> 4).view(-1, self.size), 1).view(out, blocks, 4)
        low = _planes((codes & 15).view(out, blocks, 2, 16), 4)
        return torch.cat((_halves(scales), high, low), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        high = bits.unpack(raw[..., 2:6].reshape(-1, 4), 1, self.size).view(raw.shape[0], -1)
        low = _rows(_unplanes(raw[..., 6:], 4, 2))
        return Decoded(low | high << 4, _floats(raw[..., :2]), 16.0)


class Q8_0(Block):
    name, id, file_type, size, bytes, sub = "Q8_0", 8, 7, 32, 34, 32
    holds, natural = (INT8,), INT8

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return torch.cat((_halves(scales), codes ^ 0x80), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        return Decoded(_rows(raw[..., 2:] ^ 0x80), _floats(raw[..., :2]), 128.0)


class Q2_K(Block):
    """Sub-blocks of 16 with a 4-bit scale and a 4-bit minimum of two float16 each.

    SEQ goes in with d = dmin = s/2, scale 2 and minimum 3: (s/2)(2q - 3). Whole zero points go in
    with d = dmin = s, scale 1 and the zero point as minimum. Scales [out, blocks, 16] that share
    one go in as its multiples, with dmin = 1.5 d.
    """

    name, id, file_type, size, bytes, sub = "Q2_K", 10, 10, 256, 84, 16
    holds, natural = (SEQ2, INT2, UINT2), None

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        _no_negative(scales)
        stream = _planes(codes.reshape(*codes.shape[:2], 2, 4, 32), 2).flatten(-2)
        if scales.dim() == 3:
            d, each = factors(scales, SUPER_BLOCKS["Q2_K"])
            both = (each << 4 | each).to(torch.uint8)
            return torch.cat((both, stream, _halves(d), _halves(d * 1.5)), dim=-1)
        step, minima = scales, _filled(codes, 0x21, 16)
        if grid == SEQ2:
            step, minima = _half(scales), _filled(codes, 0x32, 16)
        elif zeros is not None:
            minima = (zeros << 4 | 1).unsqueeze(-1).expand(*codes.shape[:2], 16)
        return torch.cat((minima, stream, _halves(step), _halves(step)), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        codes = _unplanes(raw[..., 16:80].reshape(*raw.shape[:2], 2, 32), 2, 4)
        d, dmin = _floats(raw[..., 80:82]), _floats(raw[..., 82:84])
        step = d.unsqueeze(-1) * (raw[..., :16] & 15).float()
        minimum = dmin.unsqueeze(-1) * (raw[..., :16] >> 4).float()
        return Decoded(_rows(codes), _rows(step), None, _rows(minimum))


class Q3_K(Block):
    """Sub-blocks of 16 with a 6-bit scale about 32 of one float16; 33 is a factor of one.

    Scales [out, blocks, 16] that share one go in as its multiples.
    """

    name, id, file_type, size, bytes, sub = "Q3_K", 11, 11, 256, 110, 16
    holds, natural = (INT3,), INT3

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        shape = codes.shape[:2]
        high = _planes((codes >> 2).view(*shape, 8, 32), 1)
        low = _planes((codes & 3).view(*shape, 2, 4, 32), 2).flatten(-2)
        if scales.dim() == 3:
            d, each = factors(scales, SUPER_BLOCKS["Q3_K"])
            each = (each + 32).to(torch.uint8)
            nibbles = each[..., :8] & 15 | (each[..., 8:] & 15) << 4
            tops = (each >> 4).view(*shape, 4, 4)
            tops = (
                tops[..., 0, :] | tops[..., 1, :] << 2 | tops[..., 2, :] << 4 | tops[..., 3, :] << 6
            )
            return torch.cat((high, low, nibbles, tops, _halves(d)), dim=-1)
        ones = torch.cat((_filled(codes, 0x11, 8), _filled(codes, 0xAA, 4)), dim=-1)
        return torch.cat((high, low, ones, _halves(scales)), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        shape = raw.shape[:2]
        high = _unplanes(raw[..., :32], 1, 8).view(*shape, -1)
        low = _unplanes(raw[..., 32:96].reshape(*shape, 2, 32), 2, 4).view(*shape, -1)
        packed, tops = raw[..., 96:104], raw[..., 104:108]
        nibbles = torch.cat((packed & 15, packed >> 4), dim=-1)
        tops = torch.cat([tops >> 2 * j & 3 for j in range(4)], dim=-1)
        factors = (nibbles | tops << 4).float() - 32
        step = _floats(raw[..., 108:]).unsqueeze(-1) * factors
        return Decoded(_rows(low | high << 2), _rows(step), 4.0)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """6-bit scales and minima of eight sub-blocks, from 12 bytes."""
    first, second, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((first & 63, last & 15 | first >> 6 << 4), dim=-1)
    minima = torch.cat((second & 63, last >> 4 | second >> 6 << 4), dim=-1)
    return scales.float(), minima.float()


def _one_and_minimum(minimum: Tensor) -> Tensor:
    """Undo `_scales_and_minima` for scales of 1 and one minimum [out, blocks] below 64."""
    four = (*minimum.shape, 4)
    minimum = minimum.unsqueeze(-1)
    first = torch.ones(four, dtype=torch.uint8)
    second = (minimum & 63 | minimum >> 4 << 6).expand(four)
    last = (1 | (minimum & 15) << 4).expand(four)
    return torch.cat((first, second, last), dim=-1)


class Q4_K(Block):
    """Sub-blocks of 32 with a 6-bit scale and minimum; a zero point is the minimum, d = dmin."""

    name, id, file_type, size, bytes, sub = "Q4_K", 12, 14, 256, 144, 32
    holds, natural = (UINT4,), None

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        assert zeros is not None
        _no_negative(scales)
        d = _halves(scales)
        stream = _planes(codes.reshape(*codes.shape[:2], 4, 2, 32), 4).flatten(-2)
        return torch.cat((d, d, _one_and_minimum(zeros), stream), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        codes = _unplanes(raw[..., 16:].reshape(*raw.shape[:2], 4, 32), 4, 2)
        return _k_decoded(raw, codes)


class Q5_K(Block):
    """Like Q4_K with a fifth bit; the symmetric grid's zero point is the minimum."""

    name, id, file_type, size, bytes, sub = "Q5_K", 13, 16, 256, 176, 32
    holds, natural = (INT5,), None

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        _no_negative(scales)
        shape = codes.shape[:2]
        d = _halves(scales)
        minimum = torch.full(shape, int(grid.middle), dtype=torch.uint8)
        high = _planes((codes >> 4).view(*shape, 8, 32), 1)
        low = _planes((codes & 15).view(*shape, 4, 2, 32), 4).flatten(-2)
        return torch.cat((d, d, _one_and_minimum(minimum), high, low), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        shape = raw.shape[:2]
        high = _unplanes(raw[..., 16:48], 1, 8).view(*shape, -1)
        low = _unplanes(raw[..., 48:].reshape(*shape, 4, 32), 4, 2).view(*shape, -1)
        return _k_decoded(raw, low | high << 4)


def _k_decoded(raw: Tensor, codes: Tensor) -> Decoded:
    d, dmin = _floats(raw[..., :2]), _floats(raw[..., 2:4])
    scales, minima = _scales_and_minima(raw[..., 4:16])
    step, minimum = d.unsqueeze(-1) * scales, dmin.unsqueeze(-1) * minima
    return Decoded(_rows(codes), _rows(step), None, _rows(minimum))


class Q6_K(Block):
    """Sub-blocks of 16 with an int8 scale of one float16."""

    name, id, file_type, size, bytes, sub = "Q6_K", 14, 18, 256, 210, 16
    holds, natural = (INT6,), INT6

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return self.assemble(codes, _filled(codes, 1, 16), scales)

    def assemble(self, codes: Tensor, factors: Tensor, scales: Tensor) -> Tensor:
        """Blocks of codes, int8 factors as bytes [out, blocks, 16], and scales."""
        shape = codes.shape[:2]
        low = _planes((codes & 15).view(*shape, 2, 2, 64), 4).flatten(-2)
        high = _planes((codes >> 4).view(*shape, 2, 4, 32), 2).flatten(-2)
        return torch.cat((low, high, factors, _halves(scales)), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        shape = raw.shape[:2]
        low = _unplanes(raw[..., :128].reshape(*shape, 2, 64), 4, 2).view(*shape, -1)
        high = _unplanes(raw[..., 128:192].reshape(*shape, 2, 32), 2, 4).view(*shape, -1)
        factors = raw[..., 192:208].contiguous().view(torch.int8).float()
        step = _floats(raw[..., 208:]).unsqueeze(-1) * factors
        return Decoded(_rows(low | high << 4), _rows(step), 32.0)


# Narrowest first, and among equals the ones that more backends have kernels for.
BLOCKS: dict[str, Block] = {
    block.name: block
    for block in sorted(
        (
            *(Q1_0(), TQ1_0(), TQ2_0(), Q2_0(), Q2_K(), Q3_K(), Q4_0(), Q4_K(), Q4_1()),
            *(Q5_0(), Q5_K(), Q6_K(), Q8_0()),
        ),
        key=lambda block: block.bits_per_weight,
    )
}
BY_ID = {block.id: block for block in BLOCKS.values()}
