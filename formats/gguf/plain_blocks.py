"""Block types with one scale a block. Layouts are those of ggml (ggml-common.h, ggml-quants.c)."""

from dataclasses import replace

import torch
from torch import Tensor

from qexport import bits
from qexport.formats.gguf.block import (
    Block,
    Decoded,
    floats,
    half,
    halves,
    no_negative,
    planes,
    rows,
    unplanes,
)
from qexport.grid import BINARY, INT4, INT5, INT8, TERNARY, UINT2, Grid
from qexport.grid import IQ4_NL as CODEBOOK

__all__ = ["IQ4_NL", "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]


class Q1_0(Block):
    """Signs about half a scale."""

    name, id, file_type, size, bytes, sub = "Q1_0", 41, 40, 128, 18, 128
    holds, natural = (BINARY,), BINARY

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        out, blocks, _ = codes.shape
        stream = bits.pack(codes.view(-1, self.size), 1).view(out, blocks, -1)
        return torch.cat((halves(half(scales)), stream), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        stream = raw[..., 2:].reshape(-1, 16)
        codes = bits.unpack(stream, 1, self.size).view(raw.shape[0], -1)
        return Decoded(codes, floats(raw[..., :2]) * 2, 0.5)


class Q2_0(Block):
    """Two bits a weight, one after the other, about one."""

    name, id, file_type, size, bytes, sub = "Q2_0", 42, 41, 64, 18, 64
    holds, natural = (TERNARY,), UINT2

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        out, blocks, _ = codes.shape
        stream = bits.pack(codes.view(-1, self.size), 2).view(out, blocks, -1)
        return torch.cat((halves(scales), stream), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        stream = raw[..., 2:].reshape(-1, 16)
        codes = bits.unpack(stream, 2, self.size).view(raw.shape[0], -1)
        return Decoded(codes, floats(raw[..., :2]), 1.0)


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
        return torch.cat((*parts, halves(scales)), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        parts = []
        at = 0
        for _, _, width, digits in self._runs:
            run = raw[..., at : at + width].to(torch.int32)
            at += width
            found = [((run * 3**n & 0xFF) * 3) >> 8 for n in range(digits)]
            parts.append(torch.stack(found, dim=-2).to(torch.uint8).flatten(-2))
        return Decoded(rows(torch.cat(parts, dim=-1)), floats(raw[..., 52:]), 1.0)


class TQ2_0(Block):
    """Two bits a weight, four of them a quarter apart in a byte."""

    name, id, file_type, size, bytes, sub = "TQ2_0", 35, 37, 256, 66, 256
    holds, natural = (TERNARY,), TERNARY

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        stream = planes(codes.reshape(*codes.shape[:2], 2, 4, 32), 2).flatten(-2)
        return torch.cat((stream, halves(scales)), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        stream = raw[..., :64].reshape(*raw.shape[:2], 2, 32)
        return Decoded(rows(unplanes(stream, 2, 4)), floats(raw[..., 64:]), 1.0)


class Q4_0(Block):
    """Four bits a weight; the halves of a block share bytes."""

    name, id, file_type, size, bytes, sub = "Q4_0", 2, 2, 32, 18, 32
    holds, natural = (INT4,), INT4

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        stream = planes(codes.reshape(*codes.shape[:2], 2, 16), 4)
        return torch.cat((halves(scales), stream), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        return Decoded(rows(unplanes(raw[..., 2:], 4, 2)), floats(raw[..., :2]), 8.0)


class IQ4_NL(Q4_0):
    """Q4_0 with a codebook."""

    name, id, file_type = "IQ4_NL", 20, 25
    holds, natural = (CODEBOOK,), CODEBOOK

    def decode(self, raw: Tensor) -> Decoded:
        return replace(super().decode(raw), zero=None, values=CODEBOOK.values)


def _step_and_minimum(grid: Grid, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Two float16 of a block, as bytes [out, blocks, 4]."""
    no_negative(scales)
    zero = grid.middle if zeros is None else zeros.float()
    minimum = (scales.float() * -zero).to(torch.float16)
    if not bool(minimum.isfinite().all()):
        raise ValueError("a scale is too large for a float16 minimum")
    return torch.cat((halves(scales), halves(minimum)), dim=-1)


class Q4_1(Block):
    """Keeps a minimum as a float16: exact for the symmetric grid, rounded for zero points."""

    name, id, file_type, size, bytes, sub = "Q4_1", 3, 3, 32, 20, 32
    holds, natural = (INT4,), None

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        stream = planes(codes.reshape(*codes.shape[:2], 2, 16), 4)
        return torch.cat((_step_and_minimum(grid, scales, zeros), stream), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        codes = rows(unplanes(raw[..., 4:], 4, 2))
        return Decoded(codes, floats(raw[..., :2]), None, -floats(raw[..., 2:4]))


class Q5_0(Block):
    """Q4_0 with the fifth bits apart."""

    name, id, file_type, size, bytes, sub = "Q5_0", 6, 8, 32, 22, 32
    holds, natural = (INT5,), INT5

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return torch.cat((halves(scales), _five_bits(codes)), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        return Decoded(_of_five_bits(raw[..., 2:]), floats(raw[..., :2]), 16.0)


class Q5_1(Block):
    """Q4_1 with the fifth bits apart."""

    name, id, file_type, size, bytes, sub = "Q5_1", 7, 9, 32, 24, 32
    holds, natural = (INT5,), None

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return torch.cat((_step_and_minimum(grid, scales, zeros), _five_bits(codes)), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        codes = _of_five_bits(raw[..., 4:])
        return Decoded(codes, floats(raw[..., :2]), None, -floats(raw[..., 2:4]))


def _five_bits(codes: Tensor) -> Tensor:
    """uint8 [out, blocks, 32] as bytes [out, blocks, 20]: the fifth bits, then the others."""
    out, blocks, size = codes.shape
    high = bits.pack((codes >> 4).view(-1, size), 1).view(out, blocks, 4)
    return torch.cat((high, planes((codes & 15).view(out, blocks, 2, 16), 4)), dim=-1)


def _of_five_bits(raw: Tensor) -> Tensor:
    """Undo `_five_bits`, to [out, in]."""
    high = bits.unpack(raw[..., :4].reshape(-1, 4), 1, 32).view(raw.shape[0], -1)
    return rows(unplanes(raw[..., 4:], 4, 2)) | high << 4


class Q8_0(Block):
    """Signed bytes."""

    name, id, file_type, size, bytes, sub = "Q8_0", 8, 7, 32, 34, 32
    holds, natural = (INT8,), INT8

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return torch.cat((halves(scales), codes ^ 0x80), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        return Decoded(rows(raw[..., 2:] ^ 0x80), floats(raw[..., :2]), 128.0)
