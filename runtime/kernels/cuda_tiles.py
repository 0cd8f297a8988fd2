"""How CUDA kernels divide the work: measured choices where there are some, rules where not.

`cuda_tiles.json`, written by `python -m benchmarks.gpu --tune` on the machine itself, holds for
each architecture

    kernels   {"bits/span": name of the kernel that was the fastest for up to 16 tokens}
    tiles     {"bits/span": {most tokens: Tile}}
    dense     the number of tokens from which weights are made dense and cuBLAS multiplies

and the figures behind it are in benchmarks/results. None has been measured yet: no such file is
here, and every choice is the rules'.
"""

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from qexport.grid import Scheme
from qexport.runtime.kernels.cuda_layout import chunk_inputs
from qexport.runtime.kernels.cuda_source import MOST_BITS, Tile, WeightKind

__all__ = [
    "BUCKETS",
    "TABLE",
    "candidates",
    "dense_from",
    "forget_table",
    "preferred",
    "splits",
    "tile_for",
]

TABLE = Path(__file__).parent / "cuda_tiles.json"
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # of tokens, that tiles are chosen for
_DENSE_FROM = 513
_MOST_SPLITS = 16
_FIRST = 2  # chunks that could be gone through while a block begins and ends


@cache
def tile_for(architecture: str, kind: WeightKind, tokens: int) -> Tile:
    """The tile for so many tokens."""
    measured = _table().get(architecture, {}).get("tiles", {}).get(f"{kind.bits}/{kind.span}", {})
    bucket = next((bucket for bucket in BUCKETS if tokens <= bucket), BUCKETS[-1])
    if not kind.zeros and str(bucket) in measured:
        return Tile(**measured[str(bucket)])
    return _rule(architecture, kind, tokens)


def candidates(architecture: str, kind: WeightKind, tokens: int) -> list[Tile]:
    """Tiles worth measuring; the rule's comes first."""
    first = _rule(architecture, kind, tokens)
    columns = 1 if tokens <= 8 else 2
    if tokens <= 16:
        others = [
            Tile(tiles, columns, warps_n, 8 // warps_n, stages, ahead, blocks)
            for tiles, blocks in ((1, 3), (1, 2), (2, 2), (2, 1), (4, 2), (4, 1))
            for warps_n in (1, 2)
            for stages, ahead in ((4, 1), (4, 2), (6, 1))
        ]
    else:
        wide = min(16, max(4, 1 << (-(-tokens // 8) - 1).bit_length()))
        warpgroups = architecture == "sm_90a"
        others = [
            Tile(1, columns, warps_n, warps_k, stages, 1, blocks, wgmma)
            for columns in {wide, max(4, wide // 2)}
            for wgmma in ((True, False) if warpgroups else (False,))
            for warps_n, warps_k in ((4, 1), (4, 2), (8, 1))
            for stages in (4, 6)
            for blocks in (1, 2)
            if wgmma or columns <= 8
        ]
    return [first, *(tile for tile in dict.fromkeys(others) if tile != first)]


def dense_from(architecture: str) -> int:
    """Tokens from which dense weights and cuBLAS are faster."""
    return int(_table().get(architecture, {}).get("dense", _DENSE_FROM))


def preferred(architecture: str, scheme: Scheme) -> str | None:
    """The kernel that was the fastest for up to 16 tokens, where that was measured."""
    if scheme.grid.bits > MOST_BITS:
        return None
    kind = WeightKind.of(scheme)
    name = _table().get(architecture, {}).get("kernels", {}).get(f"{kind.bits}/{kind.span}")
    return None if name is None else str(name)


def splits(tile: Tile, bits: int, tokens: int, outputs: int, chunks: int, processors: int) -> int:
    """Parts of the inputs that blocks take, so that few tokens keep every multiprocessor busy.

    The number for which the chunks that a warp goes through are fewest: rounds of blocks, times
    chunks and the first ones' way from memory, and what it takes to write and read partial sums.
    """
    blocks = -(-outputs // tile.outputs) * -(-tokens // tile.tokens)
    slots = processors * tile.blocks
    most = max(1, min(_MOST_SPLITS, chunks // tile.warps_k))
    # bytes that all blocks together stream while each of their warps goes through a chunk
    streamed = slots * tile.outputs * tile.warps_k * chunk_inputs(bits) * bits / 8

    def cost(parts: int) -> float:
        rounds = -(-blocks * parts // slots)
        work = rounds * (-(-chunks // (parts * tile.warps_k)) + _FIRST)
        return work + (1 + 8 * parts * tokens * outputs / streamed if parts > 1 else 0)

    return min(range(1, most + 1), key=cost)


def forget_table() -> None:
    """Read it anew when it is next wanted: it was written."""
    _table.cache_clear()


def _rule(architecture: str, kind: WeightKind, tokens: int) -> Tile:
    """As much as registers hold without a spill (benchmarks/results/cuda-compiled)."""
    many_scales = 0 < kind.span < 64
    if tokens <= 16:  # weights as a stream, two blocks on a multiprocessor
        columns = 1 if tokens <= 8 else 2
        stages = 4 if columns == 1 or architecture in ("sm_80", "sm_90a", "sm_100") else 3
        tiles = 4 if kind.bits == 2 and not many_scales and not kind.zeros else 2
        if columns == 2:
            tiles = 1 if many_scales or kind.bits == 3 else 2
        elif many_scales and kind.bits == 3:
            tiles = 1
        alone = kind.zeros or (many_scales and columns == 2 and kind.bits in (1, 3))
        return Tile(tiles, columns, 1, 8, stages, 1, 1 if alone else 2)
    if architecture == "sm_90a":
        if tokens <= 64:
            return Tile(1, 4 if tokens <= 32 else 8, 4, 2, 4, 1, wgmma=True)
        return Tile(1, 8 if kind.zeros else 16, 8, 1, 4, 1, wgmma=True)
    columns = min(4 if many_scales or kind.zeros else 8, -(-tokens // 8))
    return Tile(1, columns, 4, 2, 4, 1) if tokens <= 32 else Tile(1, columns, 8, 1, 4, 1)


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    return found
