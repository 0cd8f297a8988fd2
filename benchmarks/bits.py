"""How fast codes are packed and unpacked, per width, against a copy of the same bytes."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import record
from qexport import bits

SHAPE = (4096, 4096)


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `work`, after one call to warm up."""
    work()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    """Measure every width, print millions of weights a second, and record all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    weights = SHAPE[0] * SHAPE[1]
    codes = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    copy = median_seconds(codes.clone, repeats)
    rows = []
    for width in range(1, 9):
        narrow = codes >> (8 - width)
        packed = bits.pack(narrow, width)
        packing = median_seconds(lambda c=narrow, w=width: bits.pack(c, w), repeats)  # type: ignore[misc]
        unpacking = median_seconds(
            lambda p=packed, w=width: bits.unpack(p, w, SHAPE[1]),  # type: ignore[misc]
            repeats,
        )
        rows.append({"bits": width, "pack_s": packing, "unpack_s": unpacking})
        speeds = (weights / seconds / 1e6 for seconds in (packing, unpacking))
        print("{} bits: pack {:.0f}, unpack {:.0f} million weights/s".format(width, *speeds))
    print(record("bits", {"shape": SHAPE, "copy_s": copy, "rows": rows}))


if __name__ == "__main__":
    main()
