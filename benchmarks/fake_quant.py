"""What quantization costs in training: one layer's step with fake-quantized and with plain weights.

A step is forward and backward of one linear layer in bfloat16 autocast, with the weight read
through `FakeQuantize` or as it is. Quoted is the ratio of medians, at several token counts: the
work on weights does not grow with the tokens, so that its share falls with the batch.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from benchmarks.machine import record
from qexport.grid import Scheme
from qexport.paretoq import WIDTHS
from qexport.train.prepare import FakeQuantize

SHAPE = (1536, 576)  # SmolLM2-135M's up_proj
TOKENS = (256, 1024, 4096)


def seconds(layer: nn.Module, tokens: int, repeats: int) -> list[float]:
    """Wall time of each of `repeats` training steps, after three to warm up."""
    inputs = torch.randn(tokens, SHAPE[1], requires_grad=True)
    taken = []
    for index in range(repeats + 3):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(inputs).float().square().mean()
        torch.autograd.backward(loss)
        if index >= 3:
            taken.append(time.perf_counter() - started)
        layer.zero_grad()
    return taken


def measure(bits: str | None, tokens: int, repeats: int) -> dict[str, Any]:
    """Median and quartiles, in milliseconds, of a layer of `bits` bits; None is plain."""
    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    if bits is not None:
        scheme = Scheme(WIDTHS[bits].grid, 64)
        reader = FakeQuantize(layer.weight, scheme, "mse")
        parametrize.register_parametrization(layer, "weight", reader, unsafe=True)
    taken = seconds(layer, tokens, repeats)
    low, median, high = statistics.quantiles(taken, n=4)
    return {"median_ms": median * 1e3, "quartiles_ms": [low * 1e3, high * 1e3]}


def main() -> None:
    """Measure every width, print the ratios, and record all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    repeats = parser.parse_args().repeats
    rows = []
    for tokens in TOKENS:
        plain = measure(None, tokens, repeats)
        for bits in WIDTHS:
            quantized = measure(bits, tokens, repeats)
            ratio = quantized["median_ms"] / plain["median_ms"]
            rows.append(
                {"bits": bits, "tokens": tokens, "ratio": ratio, "plain": plain, "quant": quantized}
            )
            print(f"{bits:>4} bits, {tokens:>4} tokens: {ratio:.2f} times a plain step")
    print(record("fake_quant", {"shape": SHAPE, "group_size": 64, "rows": rows}))


if __name__ == "__main__":
    main()
