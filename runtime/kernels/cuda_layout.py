"""The order of codes for CUDA kernels: fragments of mma.m16n8k16, as decode.cuh takes them.

A fragment is 16 outputs x 16 inputs. Lane l of a warp has four registers of it, of two numbers
each: register r holds output l // 4 + 8 * (r % 2) and inputs 2 * (l % 4) + 8 * (r // 2) and the
next (PTX ISA, "Matrix fragments for mma.m16n8k16").
"""

import torch
from torch import Tensor

__all__ = ["from_fragments", "inputs_of_words", "to_fragments"]

_LANES, _REGISTERS, _SIDE = 32, 4, 16
_WORDS = {1: 1, 2: 1, 3: 3, 4: 1}  # that are decoded together
_PAIRS = {1: 16, 2: 8, 3: 16, 4: 4}  # in them


def inputs_of_words(bits: int) -> int:
    """Inputs whose codes a lane's words hold together: whole fragments."""
    return _PAIRS[bits] // _REGISTERS * _SIDE


def to_fragments(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [out, in] as int32 [out / 16, in / inputs_of_words, words, 32 lanes].

    out is a multiple of 16, in of `inputs_of_words`; bits are 1, 2, 3 or 4.
    """
    out, inputs = codes.shape
    span, pairs = inputs_of_words(bits), _PAIRS[bits]
    # [tile, upper row, row / lane, span, fragment, upper column, lane, number]
    split = codes.view(out // 16, 2, 8, inputs // span, span // _SIDE, 2, 4, 2)
    # registers are (upper column, upper row)
    ordered = split.permute(0, 3, 4, 5, 1, 2, 6, 7).reshape(
        out // 16, inputs // span, pairs, _LANES, 2
    )
    halves = ordered.to(torch.int64)
    both = halves[..., 0] | halves[..., 1] << 16  # [tile, span, pair, lane]
    words = torch.zeros(*both.shape[:2], _WORDS[bits], _LANES, dtype=torch.int64)
    for pair in range(pairs):
        for word, bit, taken in _places(bits, pair):
            low, mask = taken
            words[:, :, word] |= (both[:, :, pair] >> low & mask * 0x10001) << bit
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def from_fragments(words: Tensor, bits: int) -> Tensor:
    """What `to_fragments` was given."""
    tiles, spans = words.shape[:2]
    wide, pairs = words.to(torch.int64) & 0xFFFFFFFF, _PAIRS[bits]
    both = torch.zeros(tiles, spans, pairs, _LANES, dtype=torch.int64)
    for pair in range(pairs):
        for word, bit, (low, mask) in _places(bits, pair):
            both[:, :, pair] |= (wide[:, :, word] >> bit & mask * 0x10001) << low
    halves = torch.stack([both & 0xFFFF, both >> 16], -1)
    split = halves.view(tiles, spans, pairs // _REGISTERS, 2, 2, 8, 4, 2)
    ordered = split.permute(0, 4, 5, 1, 2, 3, 6, 7)
    return ordered.reshape(tiles * 16, spans * inputs_of_words(bits)).to(torch.uint8)


def _places(bits: int, pair: int) -> list[tuple[int, int, tuple[int, int]]]:
    """Where a pair's bits stand: word, bit, and (first bit of the code, mask of those taken)."""
    if bits != 3:
        return [(0, pair * bits, (0, (1 << bits) - 1))]
    if pair < 15:
        return [(pair // 5, pair % 5 * 3, (0, 7))]
    return [(word, 15, (word, 1)) for word in range(3)]
