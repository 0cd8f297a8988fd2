"""Dense embeddings rounded to blocks: the one place where weights are, and only when asked for."""

import torch
from torch import Tensor

from qexport.formats.gguf.blocks import BLOCKS
from qexport.formats.gguf.k_blocks import Q6_K
from qexport.grid import INT8

__all__ = ["round_to_q6_k", "round_to_q8_0"]


def round_to_q8_0(weight: Tensor) -> Tensor:
    """Nearest Q8_0 blocks of a dense matrix [out, in], the largest weight of a block at 127."""
    blocks = weight.float().view(weight.shape[0], -1, 32)
    scales = (blocks.abs().amax(-1) / 127).to(torch.float16)
    codes = _nearest(blocks, scales.float(), 127) + 128
    return BLOCKS["Q8_0"].encode(INT8, codes.to(torch.uint8), scales, None)


def round_to_q6_k(weight: Tensor) -> Tensor:
    """Nearest Q6_K blocks of a dense matrix [out, in], the largest weight of 16 at 31 or nearby."""
    shape = (weight.shape[0], weight.shape[1] // 256)
    groups = weight.float().view(*shape, 16, 16)
    ideal = groups.abs().amax(-1) / 31
    scales = (ideal.amax(-1) / 127).to(torch.float16)
    factors = _nearest(ideal, scales.float(), 127)
    codes = _nearest(groups, scales.float().unsqueeze(-1) * factors, 31) + 32
    block = BLOCKS["Q6_K"]
    assert isinstance(block, Q6_K)
    whole = codes.to(torch.uint8).view(*shape, 256)
    return block.assemble(whole, factors.to(torch.int8).view(torch.uint8), scales)


def _nearest(values: Tensor, steps: Tensor, largest: int) -> Tensor:
    """values / steps to the nearest whole number, at most `largest`; 0 where a step is 0."""
    steps = steps.unsqueeze(-1)
    ratio = torch.where(steps == 0, torch.zeros_like(values), values / steps)
    return ratio.round().clamp(-largest, largest)
