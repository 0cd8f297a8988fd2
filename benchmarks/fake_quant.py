"""What quantization costs in training: a step of SmolLM2-135M against a plain fine-tuning step.

A step is forward, backward and AdamW in bfloat16 autocast, on the same tokens. Steps of the three
models take turns, so that what else a shared machine does falls on all of them: `plain` has
ordinary parameters, `eager` and `fused` read theirs through the quantizers, as they are and
compiled. Quoted are ratios of medians. The work on weights does not grow with the tokens, so that
its share falls with the batch.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.demo import fetch
from benchmarks.machine import record
from qexport.grid import Scheme
from qexport.modelling import build_model
from qexport.paretoq import WIDTHS
from qexport.source import open_source
from qexport.training.prepare import prepare

WINDOW = 256
GROUP = 64
TOKENS = (512, 2048)


def stepping(bits: str | None, fused: bool, device: torch.device) -> Callable[[torch.Tensor], None]:
    """A model of `bits` bits, None for plain, as what makes one step on tokens [n, length]."""
    source = open_source(fetch())
    assert source is not None
    model: Any = build_model(source, torch.float32, lambda name: source.dense(name).float())
    model.config.use_cache = False
    if bits is not None:
        scheme = Scheme(WIDTHS[bits].grid, GROUP)
        prepare(model, lambda _: scheme, "paper", torch.bfloat16, fused=fused)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(tokens: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device

    return step


def measure(bits: str, count: int, repeats: int) -> dict[str, Any]:
    """Medians and quartiles in seconds, of steps of `count` tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dice = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40_000, (count // WINDOW, WINDOW), generator=dice).to(device)
    steps = {
        "plain": stepping(None, False, device),
        "eager": stepping(bits, False, device),
        "fused": stepping(bits, True, device),
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(repeats + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step(tokens)
            if index >= 2:
                taken[name].append(time.perf_counter() - started)
    found: dict[str, Any] = {"bits": bits, "tokens": count}
    for name, times in taken.items():
        low, median, high = statistics.quantiles(times, n=4)
        found[name] = {"median_s": median, "quartiles_s": [low, high]}
    for name in ("eager", "fused"):
        found[f"{name}_ratio"] = found[name]["median_s"] / found["plain"]["median_s"]
    return found


def main() -> None:
    """Measure every width, print the ratios, and record all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", nargs="*", choices=WIDTHS, default=list(WIDTHS))
    asked = parser.parse_args()
    rows = []
    for count in TOKENS:
        for bits in asked.width:
            rows.append(measure(bits, count, asked.repeats))
            ratios = f"{rows[-1]['fused_ratio']:.2f} fused, {rows[-1]['eager_ratio']:.2f} eager"
            print(f"{bits:>4} bits, {count:>4} tokens: {ratios} times a plain step", flush=True)
    print(record("fake_quant", {"window": WINDOW, "group_size": GROUP, "rows": rows}))


if __name__ == "__main__":
    main()
