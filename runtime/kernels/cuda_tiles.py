"""How CUDA kernels divide the work: measured choices where there are some, rules where not.

`cuda_tiles.json`, written by `python -m benchmarks.gpu --tune` on the machine itself, holds for
each architecture {"tiles": {"bits/span": {most tokens: Tile}}, "dense": the number of tokens from
which weights are made dense and multiplied by cuBLAS}. Its figures are in benchmarks/results.
"""

import json
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from qexport.runtime.kernels.cuda_source import Tile, WeightKind

__all__ = ["BUCKETS", "TABLE", "candidates", "dense_from", "splits", "tile_for"]

TABLE = Path(__file__).parent / "cuda_tiles.json"
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # of tokens, that tiles are chosen for
_DENSE_FROM = 513
_MOST_SPLITS = 16
_THREADS = 512  # of a multiprocessor that a kernel's registers leave room for, about
_COST = 0.04  # of one more part of the inputs, in parts of a call


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
            Tile(tiles, columns, warps_n, 8 // warps_n, stages, ahead)
            for tiles in (1, 2, 4)
            for warps_n in (1, 2)
            for stages, ahead in ((4, 1), (4, 2), (6, 1))
        ]
    else:
        wide = min(16, max(4, 1 << (-(-tokens // 8) - 1).bit_length()))
        warpgroups = architecture == "sm_90a"
        others = [
            Tile(1, columns, warps_n, warps_k, stages, 1, wgmma)
            for columns in {wide, max(4, wide // 2)}
            for wgmma in ((True, False) if warpgroups else (False,))
            for warps_n, warps_k in ((4, 1), (4, 2), (8, 1))
            for stages in (4, 6)
            if wgmma or columns <= 8
        ]
    return [first, *(tile for tile in dict.fromkeys(others) if tile != first)]


def dense_from(architecture: str) -> int:
    """Tokens from which dense weights and cuBLAS are faster."""
    return int(_table().get(architecture, {}).get("dense", _DENSE_FROM))


def splits(tile: Tile, tokens: int, outputs: int, chunks: int, processors: int) -> int:
    """Parts of the inputs that blocks take, so that few tokens keep every multiprocessor busy.

    The number that makes `rounds of blocks / parts` least, a little being lost for each part.
    """
    blocks = -(-outputs // tile.outputs) * -(-tokens // tile.tokens)
    slots = processors * max(1, _THREADS // tile.threads)
    most = max(1, min(_MOST_SPLITS, chunks // tile.warps_k))

    def cost(parts: int) -> float:
        return -(-blocks * parts // slots) / parts * (1 + _COST * (parts - 1))

    return min(range(1, most + 1), key=cost)


def _rule(architecture: str, kind: WeightKind, tokens: int) -> Tile:
    if tokens <= 16:  # weights as a stream; 3 and 4 bits fill registers sooner
        return Tile(4 if kind.bits <= 2 else 2, 1 if tokens <= 8 else 2, 1, 8, 4, 1)
    if architecture == "sm_90a":
        if tokens <= 64:
            return Tile(1, 4 if tokens <= 32 else 8, 4, 2, 4, 1, wgmma=True)
        wide = Tile(1, 16, 8, 1, 4, 1, wgmma=True)
        return replace(wide, columns=8) if kind.zeros else wide
    return Tile(
        1, min(8, -(-tokens // 8)), 4 if tokens <= 32 else 8, 2 if tokens <= 32 else 1, 4, 1
    )


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    return found
