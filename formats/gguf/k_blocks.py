"""K-quants: super-blocks of 256 with scales of scales. Layouts are those of ggml-common.h."""

from abc import abstractmethod

import torch
from torch import Tensor

from qexport.formats.gguf.block import (
    Block,
    Decoded,
    filled,
    floats,
    half,
    halves,
    no_negative,
    planes,
    rows,
    unplanes,
)
from qexport.grid import (
    INT2,
    INT3,
    INT5,
    INT6,
    KQ2,
    KQ4,
    KQ5,
    SEQ2,
    UINT2,
    UINT4,
    Grid,
    SuperBlock,
)
from qexport.tensor import factors

__all__ = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "SuperBlocked"]


class SuperBlocked(Block):
    """A type whose scales share one, all of which a scheme with a `super_block` makes use of."""

    @abstractmethod
    def encode_super(
        self, block: SuperBlock, codes: Tensor, scales: Tensor, minima: Tensor | None
    ) -> Tensor:
        """Bytes of codes [out, blocks, 256], scales and minima [out, blocks, groups].

        Raises ValueError where they are no multiples of one.
        """


class Q2_K(SuperBlocked):
    """Sub-blocks of 16 with a 4-bit scale and a 4-bit minimum of two float16 each.

    SEQ goes in with d = dmin = s/2, scale 2 and minimum 3: (s/2)(2q - 3). Whole zero points go in
    with d = dmin = s, scale 1 and the zero point as minimum. SEQ's scales that share one go in as
    its multiples, with dmin = 1.5 d.
    """

    name, id, file_type, size, bytes, sub = "Q2_K", 10, 10, 256, 84, 16
    holds, natural = (SEQ2, INT2, UINT2, KQ2), None

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        no_negative(scales)
        step, minima = scales, filled(codes, 0x21, 16)
        if grid == SEQ2:
            step, minima = half(scales), filled(codes, 0x32, 16)
        elif zeros is not None:
            minima = (zeros << 4 | 1).unsqueeze(-1).expand(*codes.shape[:2], 16)
        return self._joined(minima, codes, step, step)

    def encode_super(
        self, block: SuperBlock, codes: Tensor, scales: Tensor, minima: Tensor | None
    ) -> Tensor:
        d, each = factors(scales, block)
        if minima is None:  # of SEQ
            return self._joined(each << 4 | each, codes, d, d * 1.5)
        dmin, low = factors(minima, block, least=0)
        return self._joined(low << 4 | each, codes, d, dmin)

    def _joined(self, scales: Tensor, codes: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
        stream = planes(codes.reshape(*codes.shape[:2], 2, 4, 32), 2).flatten(-2)
        return torch.cat((scales.to(torch.uint8), stream, halves(d), halves(dmin)), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        codes = unplanes(raw[..., 16:80].reshape(*raw.shape[:2], 2, 32), 2, 4)
        d, dmin = floats(raw[..., 80:82]), floats(raw[..., 82:84])
        step = d.unsqueeze(-1) * (raw[..., :16] & 15).float()
        minimum = dmin.unsqueeze(-1) * (raw[..., :16] >> 4).float()
        return Decoded(rows(codes), rows(step), None, rows(minimum))


class Q3_K(SuperBlocked):
    """Sub-blocks of 16 with a 6-bit scale about 32 of one float16; 33 is a factor of one."""

    name, id, file_type, size, bytes, sub = "Q3_K", 11, 11, 256, 110, 16
    holds, natural = (INT3,), INT3

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        ones = torch.cat((filled(codes, 0x11, 8), filled(codes, 0xAA, 4)), dim=-1)
        return self._joined(codes, ones, scales)

    def encode_super(
        self, block: SuperBlock, codes: Tensor, scales: Tensor, minima: Tensor | None
    ) -> Tensor:
        d, each = factors(scales, block, block.least)
        each = (each + 32).to(torch.uint8)
        nibbles = each[..., :8] & 15 | (each[..., 8:] & 15) << 4
        tops = planes((each >> 4).view(*codes.shape[:2], 4, 4).repeat(1, 1, 1, 2), 2)[..., :4]
        return self._joined(codes, torch.cat((nibbles, tops), dim=-1), d)

    def _joined(self, codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
        shape = codes.shape[:2]
        high = planes((codes >> 2).view(*shape, 8, 32), 1)
        low = planes((codes & 3).view(*shape, 2, 4, 32), 2).flatten(-2)
        return torch.cat((high, low, scales, halves(d)), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        shape = raw.shape[:2]
        high = unplanes(raw[..., :32], 1, 8).view(*shape, -1)
        low = unplanes(raw[..., 32:96].reshape(*shape, 2, 32), 2, 4).view(*shape, -1)
        packed, tops = raw[..., 96:104], raw[..., 104:108]
        nibbles = torch.cat((packed & 15, packed >> 4), dim=-1)
        tops = torch.cat([tops >> 2 * j & 3 for j in range(4)], dim=-1)
        factors = (nibbles | tops << 4).float() - 32
        step = floats(raw[..., 108:]).unsqueeze(-1) * factors
        return Decoded(rows(low | high << 2), rows(step), 4.0)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """6-bit scales and minima of eight sub-blocks, from 12 bytes."""
    first, second, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((first & 63, last & 15 | first >> 6 << 4), dim=-1)
    minima = torch.cat((second & 63, last >> 4 | second >> 6 << 4), dim=-1)
    return scales.float(), minima.float()


def _packed(scales: Tensor, minima: Tensor) -> Tensor:
    """Undo `_scales_and_minima`: 12 bytes of factors below 64, [out, blocks, 8] each."""
    scales, minima = scales.to(torch.uint8), minima.to(torch.uint8)
    first = scales[..., :4] | scales[..., 4:] >> 4 << 6
    second = minima[..., :4] | minima[..., 4:] >> 4 << 6
    last = scales[..., 4:] & 15 | minima[..., 4:] << 4
    return torch.cat((first, second, last), dim=-1)


def _ones_and(minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of one, and one minimum [out, blocks] for all eight."""
    minima = minimum.unsqueeze(-1).expand(*minimum.shape, 8)
    return torch.ones_like(minima), minima


def _parts(
    block: SuperBlock, scales: Tensor, minima: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The 12 bytes of factors, and d and dmin."""
    assert minima is not None
    d, each = factors(scales, block)
    dmin, low = factors(minima, block, least=0)
    return _packed(each, low), d, dmin


class Q4_K(SuperBlocked):
    """Sub-blocks of 32 with a 6-bit scale and minimum; a zero point is the minimum, d = dmin."""

    name, id, file_type, size, bytes, sub = "Q4_K", 12, 14, 256, 144, 32
    holds, natural = (UINT4, KQ4), None

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        assert zeros is not None
        no_negative(scales)
        return self._joined(codes, _packed(*_ones_and(zeros)), scales, scales)

    def encode_super(
        self, block: SuperBlock, codes: Tensor, scales: Tensor, minima: Tensor | None
    ) -> Tensor:
        return self._joined(codes, *_parts(block, scales, minima))

    def _joined(self, codes: Tensor, packed: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
        stream = planes(codes.reshape(*codes.shape[:2], 4, 2, 32), 4).flatten(-2)
        return torch.cat((halves(d), halves(dmin), packed, stream), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        codes = unplanes(raw[..., 16:].reshape(*raw.shape[:2], 4, 32), 4, 2)
        return _k_decoded(raw, codes)


class Q5_K(SuperBlocked):
    """Like Q4_K with a fifth bit; the symmetric grid's zero point is the minimum."""

    name, id, file_type, size, bytes, sub = "Q5_K", 13, 16, 256, 176, 32
    holds, natural = (INT5, KQ5), None

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        no_negative(scales)
        minimum = torch.full(codes.shape[:2], int(grid.middle), dtype=torch.uint8)
        return self._joined(codes, _packed(*_ones_and(minimum)), scales, scales)

    def encode_super(
        self, block: SuperBlock, codes: Tensor, scales: Tensor, minima: Tensor | None
    ) -> Tensor:
        return self._joined(codes, *_parts(block, scales, minima))

    def _joined(self, codes: Tensor, packed: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
        shape = codes.shape[:2]
        high = planes((codes >> 4).view(*shape, 8, 32), 1)
        low = planes((codes & 15).view(*shape, 4, 2, 32), 4).flatten(-2)
        return torch.cat((halves(d), halves(dmin), packed, high, low), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        shape = raw.shape[:2]
        high = unplanes(raw[..., 16:48], 1, 8).view(*shape, -1)
        low = unplanes(raw[..., 48:].reshape(*shape, 4, 32), 4, 2).view(*shape, -1)
        return _k_decoded(raw, low | high << 4)


def _k_decoded(raw: Tensor, codes: Tensor) -> Decoded:
    d, dmin = floats(raw[..., :2]), floats(raw[..., 2:4])
    scales, minima = _scales_and_minima(raw[..., 4:16])
    step, minimum = d.unsqueeze(-1) * scales, dmin.unsqueeze(-1) * minima
    return Decoded(rows(codes), rows(step), None, rows(minimum))


class Q6_K(SuperBlocked):
    """Sub-blocks of 16 with an int8 scale of one float16."""

    name, id, file_type, size, bytes, sub = "Q6_K", 14, 18, 256, 210, 16
    holds, natural = (INT6,), INT6

    def encode(self, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return self.assemble(codes, filled(codes, 1, 16), scales)

    def encode_super(
        self, block: SuperBlock, codes: Tensor, scales: Tensor, minima: Tensor | None
    ) -> Tensor:
        d, each = factors(scales, block, block.least)
        return self.assemble(codes, each.to(torch.int8).view(torch.uint8), d)

    def assemble(self, codes: Tensor, factors: Tensor, scales: Tensor) -> Tensor:
        """Blocks of codes, int8 factors as bytes [out, blocks, 16], and scales."""
        shape = codes.shape[:2]
        low = planes((codes & 15).view(*shape, 2, 2, 64), 4).flatten(-2)
        high = planes((codes >> 4).view(*shape, 2, 4, 32), 2).flatten(-2)
        return torch.cat((low, high, factors, halves(scales)), dim=-1)

    def decode(self, raw: Tensor) -> Decoded:
        shape = raw.shape[:2]
        low = unplanes(raw[..., :128].reshape(*shape, 2, 64), 4, 2).view(*shape, -1)
        high = unplanes(raw[..., 128:192].reshape(*shape, 2, 32), 2, 4).view(*shape, -1)
        factors = raw[..., 192:208].contiguous().view(torch.int8).float()
        step = floats(raw[..., 208:]).unsqueeze(-1) * factors
        return Decoded(rows(low | high << 4), rows(step), 32.0)
