"""One linear layer on the CPU: ours, onnxruntime's MatMulNBits, torch's int4 and bfloat16.

`python -m benchmarks.cpu_kernels` times a token's pass over 4096 x 4096 weights. Each contender has
as many copies of its matrix as make 192 MiB and takes them in turn, so that weights come from
memory as they do when a model decodes; `--hot` times one copy that stays in the caches. Contenders
take turns within the run. The read bandwidth of the same threads is measured beside them.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from ctypes import byref
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import record
from qexport.grid import GRIDS, Scheme
from qexport.runtime.kernels.cpu import CpuKernel
from qexport.runtime.kernels.cpu_library import Context, library, pointer
from qexport.tensor import QuantizedTensor, portable

BENCH_PYTHON = Path(__file__).parent.parent / ".venv-bench" / "bin" / "python"
GROUPS = (32, 64, 128)
OURS = ("seq2", "int3", "int4", "int8", "binary")
TOTAL = 192 << 20
PASSES = 100  # matrices that one measurement goes through
PAUSE = 0.05  # seconds, in which the threads of the one before go to sleep

Pass = Callable[[], float]  # seconds for one matrix, averaged over all copies


@lru_cache(maxsize=1)
def threads() -> Context:
    """Threads of their own, as our decoder has."""
    return Context()


class Ort:
    """onnxruntime in a process of its own environment."""

    def __init__(self, **asked: int) -> None:
        self._process = subprocess.Popen(
            [str(BENCH_PYTHON), str(Path(__file__).with_name("ort_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.about = self._ask(asked)

    def _ask(self, value: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __call__(self) -> float:
        return float(self._ask("pass"))

    def close(self) -> None:
        """End the process and its memory."""
        self._process.communicate()


def ours(grid: str, group: int, n: int, k: int, m: int, copies: int) -> Pass:
    """Our kernel, through the same call that a model makes."""
    kernel, scheme = CpuKernel(), Scheme(GRIDS[grid], group)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, GRIDS[grid].levels, (n, k), generator=generator, dtype=torch.uint8)
    scales = portable(torch.rand(n, k // group, generator=generator) * 0.01 + 0.001).half()
    weight = QuantizedTensor(codes, scales, scheme)
    linears = [kernel.prepack(weight) for _ in range(copies)]
    x, out = torch.randn(m, k, generator=generator), torch.empty(m, n)
    kernels, context = library(), threads().handle
    assert kernels is not None

    def run() -> None:
        for linear in linears:
            kernels.qx_linear_forward(
                *(context, byref(linear.struct), pointer(x), m, pointer(out), n, False, False, 1.0)
            )

    return timed(run, copies)


def timed(run: Callable[[], None], copies: int) -> Pass:
    """Seconds for one matrix: after a pass that wakes threads up, several that count."""
    passes = max(1, round(PASSES / copies))

    def measure() -> float:
        run()
        start = time.perf_counter()
        for _ in range(passes):
            run()
        return (time.perf_counter() - start) / passes / copies

    return measure


def torch_bf16(n: int, k: int, m: int, copies: int) -> Pass:
    """torch's bfloat16 linear."""
    weights = [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(m, k, dtype=torch.bfloat16)

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    return timed(run, copies)


def torch_int4(group: int, n: int, k: int, m: int, copies: int) -> Pass:
    """torch's own int4 kernel (asymmetric, bfloat16 activations)."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2) for _ in range(copies)]
    scales = torch.rand(k // group, n, 2, dtype=torch.bfloat16)
    x = torch.randn(m, k, dtype=torch.bfloat16)

    def run() -> None:
        for weight in packed:
            torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group, scales)

    return timed(run, copies)


def bandwidth() -> float:
    """Bytes per second that our threads read of a buffer of 512 MiB; the best of several."""
    kernels = library()
    assert kernels is not None
    words = torch.ones((512 << 20) // 8, dtype=torch.int64)
    best = 0.0
    for _ in range(7):
        start = time.perf_counter()
        kernels.qx_read(threads().handle, pointer(words), len(words))
        best = max(best, words.nbytes / (time.perf_counter() - start))
    return best


def contend(contenders: dict[str, Pass], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            time.sleep(PAUSE)
            seconds = run()
            if turn:
                times[name].append(seconds)
    return times


def measure(
    group: int, n: int, m: int, hot: bool, rounds: int, threads: int
) -> list[dict[str, Any]]:
    """Rows of one group size."""
    k = n

    def copies(bits: float) -> int:
        return 1 if hot else max(1, round(TOTAL / (n * k * bits / 8)))

    peers = {
        f"onnxruntime W{bits}": Ort(
            **{"bits": bits, "group": group, "n": n, "k": k, "m": m, "threads": threads},
            **{"copies": copies(bits), "passes": max(1, round(PASSES / copies(bits)))},
        )
        for bits in (2, 4, 8)
    }
    contenders: dict[str, Pass] = {
        name: ours(name, group, n, k, m, copies(GRIDS[name].bits)) for name in OURS
    }
    contenders.update({name: one for name, one in peers.items() if "error" not in one.about})
    contenders["torch int4"] = torch_int4(group, n, k, m, copies(4))
    contenders["torch bfloat16"] = torch_bf16(n, k, m, copies(16))
    rows = []
    for name, seconds in contend(contenders, rounds).items():
        bits = GRIDS[name].bits if name in GRIDS else {"2": 2, "4": 4, "8": 8, "6": 16}[name[-1]]
        scale_bits = 0 if bits == 16 else {True: 16}.get(name in GRIDS, 32)
        size = n * k * (bits + scale_bits / group) / 8
        rows.append(
            {
                "kernel": name,
                "group": group,
                "microseconds": statistics.median(seconds) * 1e6,
                "quartiles": [q * 1e6 for q in statistics.quantiles(seconds, n=4)],
                "gb_per_s": size / statistics.median(seconds) / 1e9,
            }
        )
    for peer in peers.values():
        peer.close()
    return rows


def main() -> None:
    """Time, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hot", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    read = bandwidth()
    print(f"memory: {read / 1e9:.1f} GB/s read by {asked.threads} threads")
    rows = []
    for group in GROUPS:
        found = measure(group, asked.size, asked.tokens, asked.hot, asked.rounds, asked.threads)
        rows += found
        for row in found:
            low, _, high = row["quartiles"]
            print(
                f"g{group} {row['kernel']:16} {row['microseconds']:8.1f} us "
                f"({low:.1f} to {high:.1f}), {row['gb_per_s']:5.1f} GB/s, "
                f"{100 * row['gb_per_s'] * 1e9 / read:.0f} % of memory"
            )
    bandwidth_after = bandwidth()
    result = {
        "threads": asked.threads,
        "size": asked.size,
        "tokens": asked.tokens,
        "weights": "in the caches" if asked.hot else "from memory",
        "read_gb_per_s": [read / 1e9, bandwidth_after / 1e9],
        "rows": rows,
    }
    where = "hot" if asked.hot else "cold"
    print(record(f"cpu_kernels-{where}-m{asked.tokens}", result))


if __name__ == "__main__":
    main()
