"""The order of codes and scales for CUDA kernels: fragments of mma.m16n8k16, read 16 bytes a lane.

A fragment is 16 outputs x 16 inputs. Lane l of a warp has four registers of it, of two numbers
each: register r holds output l // 4 + 8 * (r % 2) and inputs 2 * (l % 4) + 8 * (r // 2) and the
next (PTX ISA, "Matrix fragments for mma.m16n8k16"). decode.cuh says how registers lie in words; a
lane's words lie together in fours, as many as make whole steps of 64 inputs: a chunk.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["chunk_inputs", "pack_codes", "pack_scales", "span_inputs", "unpack_codes"]

_LANES, _REGISTERS, _SIDE = 32, 4, 16
_WORDS = {1: 1, 2: 1, 3: 3, 4: 1}  # that are decoded together
_PAIRS = {1: 16, 2: 8, 3: 16, 4: 4}  # in them
_LOADS = {1: 1, 2: 1, 3: 3, 4: 2}  # of four words, that make a chunk


def chunk_inputs(bits: int) -> int:
    """Inputs of a chunk: 256, 128, 256, 128 for 1, 2, 3, 4 bits."""
    return 256 * _LOADS[bits] // bits


def span_inputs(group_size: int | None, bits: int) -> int:
    """Inputs that share a scale in a kernel: part of a group and of a chunk; 0 for all of a row."""
    return 0 if group_size is None else math.gcd(group_size, chunk_inputs(bits))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [out, in] as int32 [tiles of 16 outputs, chunks, loads, 32 lanes, 4].

    What is missing of a last tile or chunk is filled with code 0.
    """
    codes = _padded(codes, bits)
    out, inputs = codes.shape
    # a few tiles at a time: in between, codes take eight bytes each
    return torch.cat([_pack_tiles(part, bits) for part in torch.split(codes, 4096)]).view(
        out // _SIDE, inputs // chunk_inputs(bits), _LOADS[bits], _LANES, 4
    )


def _pack_tiles(codes: Tensor, bits: int) -> Tensor:
    out, inputs = codes.shape
    pairs = _PAIRS[bits]
    fragments = pairs // _REGISTERS
    spans = inputs // (fragments * _SIDE)
    # [tile, upper row, row / lane, span, fragment, upper column, lane, number]
    split = codes.view(out // _SIDE, 2, 8, spans, fragments, 2, 4, 2)
    # registers are (upper column, upper row)
    halves = split.permute(0, 3, 4, 5, 1, 2, 6, 7).reshape(-1, spans, pairs, _LANES, 2)
    both = halves[..., 0].to(torch.int64) | halves[..., 1].to(torch.int64) << 16
    words = both.new_zeros(len(both), spans, _WORDS[bits], _LANES)
    for pair in range(pairs):
        for word, bit, low, mask in _places(bits, pair):
            words[:, :, word] |= (both[:, :, pair] >> low & mask * 0x10001) << bit
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed.view(len(both), -1, 4, _LANES).transpose(2, 3).contiguous()


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """What `pack_codes` was given, filled up: uint8 [tiles * 16, chunks * chunk_inputs]."""
    tiles = len(words)
    pairs = _PAIRS[bits]
    fragments = pairs // _REGISTERS
    wide = words.to(torch.int64) & 0xFFFFFFFF
    wide = wide.view(tiles, -1, _LANES, 4).transpose(2, 3).reshape(tiles, -1, _WORDS[bits], _LANES)
    both = wide.new_zeros(tiles, wide.shape[1], pairs, _LANES)
    for pair in range(pairs):
        for word, bit, low, mask in _places(bits, pair):
            both[:, :, pair] |= (wide[:, :, word] >> bit & mask * 0x10001) << low
    halves = torch.stack([both & 0xFFFF, both >> 16], -1)
    split = halves.view(tiles, -1, fragments, 2, 2, 8, 4, 2)
    ordered = split.permute(0, 4, 5, 1, 2, 3, 6, 7)
    return ordered.reshape(tiles * _SIDE, -1).to(torch.uint8)


def pack_scales(values: Tensor, inputs: int, group_size: int | None, bits: int) -> Tensor:
    """Scales or zero points [out, groups] as [tiles, chunks, 8 rows, spans, 2].

    The last two are of a row and the one 8 below it. A span has `span_inputs` inputs; where rows
    have one scale, the result is [tiles, 8, 2]. What is missing of a last tile or chunk is 0.
    """
    out = values.shape[0]
    values = pad(values, (0, 0, 0, -out % _SIDE))
    tiles, span = len(values) // _SIDE, span_inputs(group_size, bits)
    if group_size is None:
        return values.view(tiles, 2, 8).transpose(1, 2).contiguous()
    repeated = values.repeat_interleave(group_size // span, dim=1)
    chunk = chunk_inputs(bits)
    whole = pad(repeated, (0, -(-inputs // chunk) * (chunk // span) - repeated.shape[1]))
    split = whole.view(tiles, 2, 8, -1, chunk // span)
    return split.permute(0, 3, 2, 4, 1).contiguous()


def _padded(codes: Tensor, bits: int) -> Tensor:
    out, inputs = codes.shape
    return pad(codes, (0, -inputs % chunk_inputs(bits), 0, -out % _SIDE)).contiguous()


def _places(bits: int, pair: int) -> list[tuple[int, int, int, int]]:
    """Where a pair's bits stand: word, bit there, first bit of the code, mask of those taken."""
    if bits != 3:
        return [(0, pair * bits, 0, (1 << bits) - 1)]
    if pair < 15:
        return [(pair // 5, pair % 5 * 3, 0, 7)]
    return [(word, 15, word, 1) for word in range(3)]
