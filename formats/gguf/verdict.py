"""Which block type holds a scheme, and how exactly."""

import torch

from qexport.formats.base import Options, Verdict, holds_scales
from qexport.formats.gguf.block import Block
from qexport.formats.gguf.blocks import BLOCKS
from qexport.grid import Grid, Scheme

__all__ = ["keeps_grid", "verdict_of"]


def verdict_of(scheme: Scheme, inputs: int, options: Options) -> Verdict:
    """Of layers with so many inputs: the narrowest block type that holds the scheme."""
    blocked = scheme.super_block is not None  # of whatever dtype, its scales are multiples
    exact = blocked or holds_scales(torch.float16, scheme.scale_dtype)
    holding = any(scheme.grid.factor_into(g) for block in BLOCKS.values() for g in block.holds)
    if holding and not exact and not options.allow_lossy:
        return Verdict(
            None,
            reason="gguf stores float16 scales, and these are "
            f"{scheme.scale_dtype} values (--allow-lossy rounds them)".replace("torch.", ""),
        )
    group = scheme.group_size or inputs
    fitting = [
        (block, grid, 0.0 if exact else 1.0)
        for block in BLOCKS.values()
        for grid in block.holds
        if options.block in (None, block.name)
        and options.bits in (None, block.width)
        and (_shares(scheme, block) if blocked else group % block.size == 0 and not grid.minima)
        and scheme.grid.factor_into(grid)
    ]
    if not fitting and options.allow_lossy and options.block == "Q4_1":
        fitting = _rounded_minimum(scheme, group)
    if not fitting:
        return Verdict(None, reason=_no_block(scheme, group, options))
    block, grid, bound = fitting[0]
    dtype = scheme.scale_dtype if blocked else torch.float16
    holder = Scheme(grid, scheme.group_size, dtype, scheme.super_block)
    return Verdict(holder, block.name, None, block.bits_per_weight, bound)


def keeps_grid(verdict: Verdict) -> bool:
    """Whether blocks give their codes' grid back; one with a rounded minimum is read as dense."""
    return verdict.holder is not None and verdict.holder.grid in BLOCKS[verdict.stored].holds


def _shares(scheme: Scheme, block: Block) -> bool:
    """Whether a block holds scales of a scheme as multiples of one."""
    return scheme.super_block is not None and scheme.super_block.name == block.name


def _rounded_minimum(scheme: Scheme, group: int) -> list[tuple[Block, Grid, float]]:
    """Q4_1 for zero points: its float16 minimum is off by half a unit in the last place."""
    block = BLOCKS["Q4_1"]
    if not scheme.grid.zeros or scheme.grid.bits != block.width or group % block.size:
        return []
    scales = 0.0 if holds_scales(torch.float16, scheme.scale_dtype) else 1.0
    return [(block, scheme.grid, 0.51 + scales)]


def _no_block(scheme: Scheme, group: int, options: Options) -> str:
    asked = [word for word in (options.block, options.bits and f"{options.bits} bits") if word]
    where = f" at {' and '.join(map(str, asked))}" if asked else ""
    holding = [b for b in BLOCKS.values() if any(scheme.grid.factor_into(g) for g in b.holds)]
    named = [b for b in holding if options.block in (None, b.name)]
    if not named or options.bits is not None:
        others = ", ".join(b.name for b in holding if group % b.size == 0)
        instead = f"; {others} would" if others else ""
        return f"gguf{where} has no block type that holds {scheme.grid.name} exactly{instead}"
    size = min(block.size for block in named)
    return (
        f"gguf{where} wants groups of a multiple of {size} inputs for {scheme.grid.name}, and "
        f"these have {group}"
    )
