"""Whether our layers and torch's operations slow each other: each alone, and in turns.

`python -m benchmarks.threads` alternates a layer of ours with a matrix product of torch's, as a
transformers model with replaced layers does. Threads that spin after their work would show as turns
that take longer than the parts.
"""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.machine import record
from qexport.grid import SEQ2, Scheme
from qexport.runtime.kernels.cpu import CpuKernel
from qexport.tensor import QuantizedTensor

SIZE, ROUNDS, TIMES = 2048, 15, 40


def ours() -> Callable[[], object]:
    """One token through a 2-bit layer."""
    codes = torch.randint(0, 4, (SIZE, SIZE), dtype=torch.uint8)
    scales = torch.full((SIZE, SIZE // 64), 0.01, dtype=torch.float16)
    linear = CpuKernel().prepack(QuantizedTensor(codes, scales, Scheme(SEQ2, 64)))
    x = torch.randn(1, SIZE)
    return lambda: linear.matmul(x)


def torchs() -> Callable[[], object]:
    """A product that torch parts among its threads."""
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    return lambda: a @ b


def seconds(*parts: Callable[[], object]) -> float:
    """Seconds of one turn of all parts, averaged over many."""
    start = time.perf_counter()
    for _ in range(TIMES):
        for part in parts:
            part()
    return (time.perf_counter() - start) / TIMES


def main() -> None:
    """Time, print and record."""
    torch.set_num_threads(2)
    first, second = ours(), torchs()
    found: dict[str, list[float]] = {"ours": [], "torch": [], "in turns": []}
    for turn in range(ROUNDS + 1):
        row = {"ours": seconds(first), "torch": seconds(second), "in turns": seconds(first, second)}
        for name, value in row.items():
            if turn:
                found[name].append(value * 1e6)
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratio = medians["in turns"] / (medians["ours"] + medians["torch"])
    for name, value in medians.items():
        print(f"{name}: {value:.1f} us")
    print(f"in turns over the sum of both alone: {ratio:.2f}")
    print(record("threads", {"microseconds": found, "ratio": ratio}))


if __name__ == "__main__":
    main()
