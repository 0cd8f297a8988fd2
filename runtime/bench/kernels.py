"""Kernels one by one: a linear layer's time by scheme, shape and number of tokens.

Weights come from memory, as they do when a model decodes: each contender goes through copies of its
matrix in turn, as many as fill what the caches do not hold. Contenders take turns, round by round.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from qexport.grid import Scheme
from qexport.page import Page, Table
from qexport.runtime.bench.noise import Noise
from qexport.runtime.bench.report import machine_facts
from qexport.runtime.bench.statistics import percentiles
from qexport.runtime.kernels import KERNELS
from qexport.runtime.machine import describe
from qexport.svg import line_chart
from qexport.tensor import QuantizedTensor, portable

__all__ = ["SCHEMA", "KernelSettings", "kernels_page", "measure_kernels"]

SCHEMA = "qexport.bench.kernels/1"
DENSE = "torch bfloat16"
_LEAST_TOTAL = 192 << 20  # bytes of all copies, or more where there is a larger cache
_MOST_COPIES = 1024
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_SECONDS = 0.02  # of a measurement, at least
_SKIPPED = ("reference",)  # dequantizes: what others are checked against
_PAUSE = 0.02


@dataclass(frozen=True)
class KernelSettings:
    """Schemes, shapes [out, in] and numbers of tokens: every combination is measured."""

    schemes: tuple[Scheme, ...]
    shapes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    repeats: int = 9


@dataclass
class _Contender:
    """Something that multiplies: copies of one matrix, and the bytes of each."""

    name: str
    multiply: list[Callable[[Tensor], Tensor]]
    weight_bytes: float


def measure_kernels(
    settings: KernelSettings, device: torch.device, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Everything of the report, as JSON has it; kernels that refuse are named, and why."""
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    noise = Noise()
    for scheme, shape in product(settings.schemes, settings.shapes):
        tell(f"{scheme.label}, {shape[0]} x {shape[1]}")
        weight = random_weight(scheme, shape, device)
        contenders = _contenders(weight, refused)
        exact = weight.dequantize().double()
        for batch in settings.batches:
            x = torch.randn(batch, shape[1], device=device)
            about = {"scheme": scheme.label, "out": shape[0], "in": shape[1], "tokens": batch}
            rows += _measure(contenders, x, exact, about, settings.repeats, noise)
    return {
        "schema": SCHEMA,
        "machine": describe(),
        "device": str(device),
        "settings": {
            "schemes": [scheme.label for scheme in settings.schemes],
            "shapes": settings.shapes,
            "batches": settings.batches,
            "repeats": settings.repeats,
        },
        "noise": {"clean": not noise.reasons(), "reasons": noise.reasons()},
        "refused": refused,
        "rows": rows,
    }


def random_weight(scheme: Scheme, shape: tuple[int, int], device: torch.device) -> QuantizedTensor:
    """Random codes and portable scales, the same every time."""
    dice = torch.Generator().manual_seed(0)
    groups = (shape[0], scheme.groups(shape[1]))
    codes = torch.randint(0, scheme.grid.levels, shape, generator=dice, dtype=torch.uint8)
    scales = portable(torch.rand(groups, generator=dice) * 0.01 + 0.001).to(scheme.scale_dtype)
    zeros = None
    if scheme.grid.zeros:
        zeros = torch.randint(0, scheme.grid.levels, groups, generator=dice, dtype=torch.uint8)
    return QuantizedTensor(
        codes.to(device), scales.to(device), scheme, None if zeros is None else zeros.to(device)
    )


def _contenders(weight: QuantizedTensor, refused: dict[str, str]) -> list[_Contender]:
    scheme, shape, device = weight.scheme, weight.shape, weight.codes.device
    dense = weight.dequantize(torch.bfloat16)
    found = []
    size = shape[0] * shape[1] * 2
    packed = shape[0] * shape[1] * scheme.bits_per_weight(shape[1]) / 8
    # of tiny matrices there are too few copies, for all alike
    total = min(_total(), _MOST_COPIES * packed)
    copies = [partial(_dense, dense.clone()) for _ in range(_copies(total, size))]
    found.append(_Contender(DENSE, list(copies), size))
    for name, kernel in KERNELS.items():
        if name in _SKIPPED:
            continue
        reason = kernel.refuses(scheme, shape, device)
        if reason is not None:
            refused[f"{name}, {scheme.label}"] = reason
            continue
        linears = [kernel.prepack(weight) for _ in range(_copies(total, packed))]
        found.append(_Contender(name, [one.matmul for one in linears], packed))
    return found


def _dense(weight: Tensor, x: Tensor) -> Tensor:
    return linear(x, weight)


def _copies(total: float, size: float) -> int:
    return max(1, int(total // size))


def _total() -> int:
    """Bytes that this machine's last cache does not hold."""
    try:
        cache = int(_CACHE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        cache = 0
    return max(_LEAST_TOTAL, 2 * cache)


def _measure(
    contenders: list[_Contender],
    x: Tensor,
    exact: Tensor,
    about: dict[str, Any],
    repeats: int,
    noise: Noise,
) -> list[dict[str, Any]]:
    """A row for each contender at one number of tokens."""
    want = x.double() @ exact.T
    samples: dict[str, list[float]] = {one.name: [] for one in contenders}
    for repeat in range(repeats + 1):
        for one in contenders:
            rows = _input(one, x)
            time.sleep(_PAUSE)
            noise.begin(time.process_time())
            seconds = _seconds(one, rows)
            noise.end(time.process_time())
            if repeat:  # the first one warms up
                samples[one.name].append(seconds)
    found = []
    times = {name: percentiles(values) for name, values in samples.items()}
    for one in contenders:
        took = times[one.name]["p50"]
        made = one.multiply[0](_input(one, x)).double()
        what = f"{one.name}, {about['scheme']}, {about['tokens']} tokens"
        noise.spread(what, samples[one.name])
        found.append(
            {
                **about,
                "kernel": one.name,
                "seconds": times[one.name],
                "gbps": one.weight_bytes / took / 1e9,
                "gweights_per_second": about["out"] * about["in"] / took / 1e9,
                "copies_bytes": one.weight_bytes * len(one.multiply),
                "times_dense": times[DENSE]["p50"] / took,
                "relative_error": float((made - want).norm() / want.norm()),
                "samples": samples[one.name],
            }
        )
    return found


def _input(one: _Contender, x: Tensor) -> Tensor:
    """float32 for kernels on CPUs, as decoders there have it; bfloat16 else."""
    half = one.name == DENSE or x.device.type == "cuda"
    return x.bfloat16() if half else x


def _seconds(one: _Contender, x: Tensor) -> float:
    """For one matrix, averaged over passes through all copies."""
    passes, total = 0, 0.0
    for multiply in one.multiply[:1]:
        multiply(x)  # threads wake up
    while total < _SECONDS:
        begin = time.perf_counter()
        for multiply in one.multiply:
            multiply(x)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        total += time.perf_counter() - begin
        passes += 1
    return total / passes / len(one.multiply)


_HEADINGS = (
    *("kernel", "scheme", "out", "in", "tokens", "µs p50", "p25", "p75", "GB/s"),
    *("Gweights/s", "times dense", "relative error"),
)


def kernels_page(result: dict[str, Any]) -> Page:
    """The page of what `measure_kernels` gives."""
    rows = []
    lines: dict[tuple[str, int, int], dict[str, list[tuple[float, float]]]] = {}
    for row in result["rows"]:
        times = [row["seconds"][name] * 1e6 for name in ("p50", "p25", "p75")]
        shape = (row["scheme"], row["out"], row["in"])
        rates = [row["gbps"], row["gweights_per_second"], row["times_dense"]]
        rows.append([row["kernel"], *shape, row["tokens"], *times, *rates, row["relative_error"]])
        line = lines.setdefault(shape, {}).setdefault(row["kernel"], [])
        line.append((row["tokens"], times[0]))
    charts = [
        line_chart(f"{scheme}, {out} x {inputs}", "tokens", "µs a matrix", series)
        for (scheme, out, inputs), series in lines.items()
    ]
    notes = [
        "Times are those of the call that models make, with copies of weights in turn that the "
        "caches do not hold (a row says how many bytes; of tiny matrices too few). GB/s counts "
        "codes and scales alone. The error is that of the whole product beside float64's, with "
        "the same codes: what activations lose by int8 or bfloat16.",
        *(f"Refused: {what}: {reason}." for what, reason in result["refused"].items()),
    ]
    facts = {**machine_facts(result["machine"]), "device": result["device"]}
    table = Table("Linear layers", _HEADINGS, rows)
    return Page("Kernels", facts, result["noise"]["reasons"], [table], charts, notes)
