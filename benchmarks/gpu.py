"""How fast weight-only products are on a GPU, beside peers, and which tiles are the fastest.

    python -m benchmarks.gpu            every kernel installed, at several sizes
    python -m benchmarks.gpu --tune     tiles first, into runtime/kernels/cuda_tiles.json

Each time is a CUDA graph's: one call for each of several copies of a weight, more together than the
L2 cache holds. Medians of replays, and the spread (the quartiles' distance over the median). `GB/s`
counts packed weights and scales once, cuBLAS's too; `copy` is what a copy on the same device moved,
read and written; `error` is relative, against float64. Cells that the result file has already are
not measured again; after --seconds the rest is left for another call.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_peers import PEERS, Call, Prepare
from qexport.errors import UnsupportedError
from qexport.grid import INT3, INT4, SEQ2, Grid, Scheme
from qexport.runtime.kernels import KERNELS
from qexport.runtime.kernels.cuda_launch import architecture
from qexport.runtime.kernels.cuda_matmul import PackedWeight, dense_matmul, matmul_text, tile_matmul
from qexport.runtime.kernels.cuda_source import Tile, WeightKind, compiled
from qexport.runtime.kernels.cuda_tiles import BUCKETS, TABLE, candidates, forget_table, tile_for
from qexport.tensor import QuantizedTensor

ROOT = Path(__file__).parent.parent
GRIDS = {"W2": SEQ2, "W3": INT3, "W4": INT4}
SQUARE = (8192, 8192)
LLAMA = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_BYTES = 400 << 20  # of weights in rotation: eight times the L2 cache of an H200
_REPLAYS = 15
_FINALISTS = 5  # tiles that are measured on all layers
_SAME = {2: 1, 4: 1}  # numbers of tokens that take the tile of another
_FIRST_CALL = """
import time, torch
from qexport.grid import SEQ2, Scheme
from qexport.runtime.kernels.cuda import CudaKernel
from qexport.tensor import QuantizedTensor
codes = torch.zeros(4096, 4096, dtype=torch.uint8, device="cuda")
scales = torch.ones(4096, 32, dtype=torch.float16, device="cuda")
weight = QuantizedTensor(codes, scales, Scheme(SEQ2, 128))
linear = CudaKernel().prepack(weight)
x = torch.ones(1, 4096, dtype=torch.float16, device="cuda")
torch.cuda.synchronize()
begin = time.perf_counter()
linear.matmul(x)
torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""


def timed(calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """Microseconds of one call: the median over replays, and the spread."""
    for call in calls:  # some pack their weights when they are first called
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    events = [(_event(), _event()) for _ in range(_REPLAYS)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) * 1000 / len(calls) for begin, end in events)
    middle = times[len(times) // 2]
    return middle, (times[-len(times) // 4] - times[len(times) // 4]) / middle


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copy_bandwidth() -> float:
    """GB/s that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    to = torch.empty_like(source)
    micros, _ = timed([lambda: to.copy_(source)] * 4)
    return 2 * source.nbytes / micros / 1000


def random_weight(grid: Grid, group: int | None, shape: tuple[int, int]) -> QuantizedTensor:
    scheme = Scheme(grid, group)
    codes = torch.randint(0, grid.levels, shape, dtype=torch.uint8, device="cuda")
    scales = torch.rand(shape[0], scheme.groups(shape[1]), device="cuda") * 0.02 + 0.01
    return QuantizedTensor(codes, scales.half(), scheme)


def weight_bytes(weight: QuantizedTensor) -> int:
    return weight.codes.numel() * weight.scheme.grid.bits // 8 + weight.scales.nbytes


def copies_of(grid: Grid, group: int | None, shape: tuple[int, int]) -> list[QuantizedTensor]:
    first = random_weight(grid, group, shape)
    count = -(-_BYTES // weight_bytes(first))
    return [first, *(random_weight(grid, group, shape) for _ in range(count - 1))]


def activations(tokens: int, inputs: int, half: torch.dtype) -> Tensor:
    return torch.randn(tokens, inputs, device="cuda").to(half)


class Results:
    """Cells measured so far, written after each one."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.data.setdefault("cells", {})

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self._end

    def cell(self, name: str, measure: Callable[[], object]) -> None:
        if name in self.data["cells"] or self.out_of_time:
            return
        self.data["cells"][name] = measure()
        print(name, json.dumps(self.data["cells"][name]), flush=True)
        self.save()

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.data, indent=1) + "\n")


def compare(results: Results) -> None:
    """Every kernel at every size, the sizes that matter most first."""
    for half_name, half in HALVES.items():
        for shape in (SQUARE, *LLAMA):
            for grid_name, grid in GRIDS.items():
                _compare_weight(results, half_name, half, shape, grid_name, grid)


def _compare_weight(
    results: Results,
    half_name: str,
    half: torch.dtype,
    shape: tuple[int, int],
    grid_name: str,
    grid: Grid,
) -> None:
    names = {
        tokens: f"{shape[0]}x{shape[1]} {grid_name} {half_name} M={tokens}" for tokens in TOKENS
    }
    if results.out_of_time or all(name in results.data["cells"] for name in names.values()):
        return
    weights = copies_of(grid, 128, shape)
    size = weight_bytes(weights[0])
    calls: dict[str, list[Call]] = {}
    for peer, prepare in PEERS.items():
        made = _prepared(prepare, weights, half)
        if isinstance(made, str):
            results.data.setdefault("absent", {})[f"{peer} {grid_name} {half_name}"] = made
        else:
            calls[peer] = made
    dense = weights[0].dequantize(torch.float64)
    for tokens, name in names.items():
        x = activations(tokens, shape[1], half)
        want = x.double() @ dense.T

        def measure(x: Tensor = x, want: Tensor = want) -> dict[str, dict[str, float] | str]:
            return {peer: _cell(each, x, want, size) for peer, each in calls.items()}

        results.cell(name, measure)


def _prepared(
    prepare: Prepare, weights: list[QuantizedTensor], half: torch.dtype
) -> list[Call] | str:
    try:
        made = [prepare(weight, half) for weight in weights]
    except Exception as error:  # a peer's own: its cell says so
        return repr(error)[:200]
    refused = next((call for call in made if isinstance(call, str)), None)
    return refused or [call for call in made if not isinstance(call, str)]


def _cell(calls: list[Call], x: Tensor, want: Tensor, size: int) -> dict[str, float] | str:
    """One kernel's time, and its error against float64; what is wrong where it fails."""
    try:
        error = float((calls[0](x).double() - want).norm() / want.norm())
        micros, spread = timed([partial(call, x) for call in calls])
    except Exception as failure:  # a peer's own: its cell says so
        return repr(failure)[:200]
    return {
        **{"us": round(micros, 2), "spread": round(spread, 3)},
        **{"GB/s": round(size / micros / 1000, 1), "error": round(error, 6)},
    }


def tune(results: Results, half: torch.dtype = torch.bfloat16) -> None:
    """The fastest tile of each kind and number of tokens, over layers of Llama-3-8B.

    All are compiled first, by every core, and tried on one layer; the best few run on the others.
    """
    machine = architecture(torch.device("cuda", torch.cuda.current_device()))
    table = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    place = table.setdefault(machine, {})
    tiles = place.setdefault("tiles", {})
    kinds = [(group, grid) for group in (128, 64, 32, None) for grid in GRIDS.values()]
    for group, grid in kinds:
        kind = WeightKind.of(Scheme(grid, group))
        found = tiles.setdefault(f"{kind.bits}/{kind.span}", {})
        if results.out_of_time or all(str(tokens) in found for tokens in BUCKETS):
            continue
        layers = [
            [PackedWeight.of(weight, None) for weight in copies_of(grid, group, shape)]
            for shape in LLAMA[1:]
        ]
        for tokens in BUCKETS:
            if tokens in _SAME:
                found.setdefault(str(tokens), found.get(str(_SAME[tokens])))
            if results.out_of_time or found.get(str(tokens)):
                continue
            best, gain = _best_tile(machine, kind, layers, tokens, half)
            found[str(tokens)] = asdict(best)
            print(kind.bits, kind.span, tokens, best, f"{gain:.2f} times the rule", flush=True)
            _write_table(table)
    names = place.setdefault("kernels", {})
    for group, grid in kinds:
        kind = WeightKind.of(Scheme(grid, group))
        if f"{kind.bits}/{kind.span}" not in names and not results.out_of_time:
            names[f"{kind.bits}/{kind.span}"] = _fastest(grid, group, half)
            _write_table(table)
    if "dense" not in place and not results.out_of_time:
        place["dense"] = _dense_from(half)
        _write_table(table)


def _best_tile(
    machine: str,
    kind: WeightKind,
    layers: list[list[PackedWeight]],
    tokens: int,
    half: torch.dtype,
) -> tuple[Tile, float]:
    """The fastest tile that gives what the rule's gives, and how much faster it is."""
    tiles = candidates(machine, kind, tokens)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda tile: compiled(matmul_text(kind, tile, half), machine), tiles))
    first = {tile: _time_tile(tile, layers[:1], tokens, half, tiles[0]) for tile in tiles}
    chosen = sorted(first, key=lambda tile: first[tile])[:_FINALISTS]
    last = {tile: _time_tile(tile, layers, tokens, half, tiles[0]) for tile in {*chosen, tiles[0]}}
    best = min(last, key=lambda tile: last[tile])
    return best, (last[tiles[0]] / last[best]) ** (1 / len(layers))


def _fastest(grid: Grid, group: int | None, half: torch.dtype) -> str:
    """The kernel that takes the least time for up to 16 tokens."""
    weights = copies_of(grid, group, LLAMA[1])
    times = {}
    for name in ("cuda", "humming", "triton"):
        kernel = KERNELS[name]
        if kernel.refuses(weights[0].scheme, weights[0].shape, weights[0].codes.device) is None:
            linears = [kernel.prepack(weight) for weight in weights]
            each = [activations(tokens, LLAMA[1][1], half) for tokens in (1, 4, 16)]
            micros = [timed([partial(linear.matmul, x) for linear in linears])[0] for x in each]
            times[name] = math.prod(micros)
    return min(times, key=lambda name: times[name])


def _write_table(table: dict[str, Any]) -> None:
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    tile_for.cache_clear()
    forget_table()


def _time_tile(
    tile: Tile, layers: list[list[PackedWeight]], tokens: int, half: torch.dtype, rule: Tile
) -> float:
    """Product of times over layers; infinite for a tile that cannot run, or is not right."""
    total = 1.0
    for layer in layers:
        x = activations(tokens, layer[0].inputs, half)
        try:
            want = tile_matmul(x, layer[0], rule).float()
            if (tile_matmul(x, layer[0], tile).float() - want).norm() > want.norm() * 0.01:
                print(tile, "gives something else than the rule's tile")
                return float("inf")
            total *= timed([partial(tile_matmul, x, weight, tile) for weight in layer])[0]
        except UnsupportedError as error:  # more shared memory or registers than there are
            print(tile, error)
            return float("inf")
    return total


def _dense_from(half: torch.dtype) -> int:
    """Tokens from which cuBLAS with weights made dense is faster than our own products."""
    weights = [PackedWeight.of(weight, None) for weight in copies_of(SEQ2, 128, LLAMA[2])]
    machine = architecture(torch.device("cuda", torch.cuda.current_device()))
    for tokens in (192, 256, 384, 512, 768, 1024, 1536, 2048):
        x = activations(tokens, LLAMA[2][1], half)
        tile = tile_for(machine, weights[0].kind, tokens)
        own = timed([partial(tile_matmul, x, weight, tile) for weight in weights])[0]
        by_cublas = timed([partial(dense_matmul, x, weight) for weight in weights])[0]
        print("dense", tokens, own, by_cublas)
        if by_cublas < own:
            return tokens
    return 2049


def first_calls() -> dict[str, float]:
    """Seconds of the first product in a process, with no cubins on disk and with them."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, "-c", _FIRST_CALL],
                check=True,
                capture_output=True,
                text=True,
                cwd=ROOT,
                env={**os.environ, "QEXPORT_CACHE": folder},
            )
            found[name] = round(float(done.stdout.split()[-1]), 3)
    return found


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="measure tiles first")
    parser.add_argument("--seconds", type=float, default=450)
    parser.add_argument(
        "--output", type=Path, help="result file (benchmarks/results/<device>/gpu.json)"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: run this on one.")
    name = torch.cuda.get_device_name()
    default = ROOT / "benchmarks" / "results" / name.lower().replace(" ", "-") / "gpu.json"
    results = Results(options.output or default, options.seconds)
    results.data["device"] = {"name": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    if options.tune:
        tune(results)
    results.cell("copy GB/s", lambda: round(copy_bandwidth(), 1))
    results.cell("first call s", first_calls)
    compare(results)
    results.save()
    print("every cell is measured" if not results.out_of_time else "out of time: call it again")


if __name__ == "__main__":
    main()
