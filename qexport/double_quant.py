"""Double quantization (Dettmers et al. 2023): scales of 8 bits, 256 of which share one float32.

Theirs subtracts the mean and takes a map that is denser about zero; scales are never near it. Here
they are `d * (code + 1)` for a `d` that bfloat16 holds, so that the product is exact. `256 * d` is
the largest of them, and what bitsandbytes calls `absmax` of a nested state with a linear map.
"""

import torch
from torch import Tensor

__all__ = ["BLOCK", "doubled", "redoubled", "undoubled"]

BLOCK = 256  # scales, in the order of rows
_LEVELS = 256
_LEAST = 2.0**-60


def doubled(scale: Tensor) -> Tensor:
    """Round positive float32 scales [out, groups] to what eight bits each can hold."""
    blocks = _in_blocks(scale)
    largest = blocks.amax(-1, keepdim=True)
    d = (largest / _LEVELS).clamp(min=_LEAST).to(torch.bfloat16).float()
    steps = (blocks / d).round().clamp(1, _LEVELS)
    made = torch.where(blocks == largest, _LEVELS, steps) * d  # by which d is found again
    return made.flatten()[: scale.numel()].view(scale.shape)


def undoubled(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [out, groups] and float32 [blocks], the largest, of scales that are `doubled`.

    Raises ValueError for others.
    """
    blocks = _in_blocks(scales)
    largest = blocks.amax(-1, keepdim=True)
    steps = blocks / (largest / _LEVELS)
    codes = (steps.round() - 1).clamp(0).flatten()[: scales.numel()].to(torch.uint8)
    if not torch.equal(redoubled(codes, largest.squeeze(-1)), scales.flatten()):
        raise ValueError("scales are not those of a double quantization")
    return codes.view(scales.shape), largest.squeeze(-1)


def redoubled(codes: Tensor, largest: Tensor) -> Tensor:
    """Undo `undoubled`: float32 scales of the shape of `codes`."""
    d = (largest / _LEVELS).repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    return (codes.float() + 1) * d


def _in_blocks(scales: Tensor) -> Tensor:
    """[blocks, 256], with zeros after the last."""
    flat = scales.float().flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
