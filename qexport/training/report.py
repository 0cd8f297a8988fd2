"""`report.html` of a run: what training did to the model, layer by layer.

It is made of files alone: the dense checkpoint, the RUN, and the history of its steps. Of the two
models one block at a time is held.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexport.blocks import Blocks, lost_share, relative_errors
from qexport.checkpoint import Checkpoint
from qexport.output import write_json
from qexport.page import Page, Table, html
from qexport.source import open_source
from qexport.svg import line_chart
from qexport.tensor import QuantizedTensor, quantize

__all__ = ["report", "write_report"]

_WINDOWS, _LONGEST = 2, 256  # of held-out text, for errors of outputs
_BINS, _BARS = 16, "▁▂▃▄▅▆▇█"
_SAMPLE = 1 << 18  # weights of a layer that are looked at
_TINY = torch.finfo(torch.float32).tiny


def write_report(run: Path, dense: Checkpoint, results: dict[str, Any], text: Tensor) -> None:
    """`report.json` and `report.html` in a RUN that is there; `text` are windows [n, length]."""
    found = report(run, dense, results, text)
    write_json(run / "report.json", found)
    (run / "report.html").write_text(html(_page(found)), encoding="utf-8")


def report(run: Path, dense: Checkpoint, results: dict[str, Any], text: Tensor) -> dict[str, Any]:
    """Of every layer its codes and scales, of every block its output's error, and the history."""
    trained = open_source(run)
    assert trained is not None
    return {
        "schema": "qexport.train.report/1",
        "results": results,
        "history": _history(run),
        "layers": [
            {"layer": name.removesuffix(".weight"), **_layer(trained.quantized(name), dense, name)}
            for name in sorted(trained.entries, key=_by_number)
            if trained.entries[name].scheme is not None
        ],
        "block_errors": _block_errors(dense, trained, text[:_WINDOWS, :_LONGEST]),
    }


def _by_number(name: str) -> list[tuple[int, str]]:
    """`layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _history(run: Path) -> list[dict[str, float]]:
    path = run / "trainer_state.json"
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    return [{key: row[key] for key in ("step", "loss")} for row in rows if "loss" in row]


def _layer(found: QuantizedTensor, dense: Checkpoint, name: str) -> dict[str, Any]:
    """Shares of codes, scales, and how far the weights are from where they began."""
    step = max(1, found.codes.numel() // _SAMPLE)  # every so many rows of large layers
    before, scheme = dense.dense(name)[::step].float(), found.scheme
    found = QuantizedTensor(found.codes[::step], found.scales[::step], scheme)
    scales = found.scales.float()
    counts = torch.bincount(found.codes.flatten().int(), minlength=scheme.grid.levels)
    rounded = quantize(before, scales, scheme).codes
    return {
        "scheme": scheme.label,
        "codes": (counts / counts.sum()).tolist(),
        "scales": [float(scales.min()), float(scales.median()), float(scales.max())],
        "scale_histogram": _histogram(scales),
        "changed": float((rounded != found.codes).float().mean()),
        "weight_error": float(
            (found.dequantize() - before).norm() / before.norm().clamp(min=_TINY)
        ),
    }


def _histogram(scales: Tensor) -> list[int]:
    """How many scales are in each of equal parts of their range, on a logarithmic axis."""
    logs = scales.abs().clamp(min=_TINY).log2().flatten()
    counts: list[int] = torch.histc(logs, _BINS).int().tolist()
    return counts


def _bars(counts: list[float]) -> str:
    """A histogram in one line of text."""
    highest = max(*counts, 1e-9)
    return "".join(_BARS[round(count / highest * (len(_BARS) - 1))] for count in counts)


@torch.no_grad()
def _block_errors(dense: Checkpoint, trained: Checkpoint, tokens: Tensor) -> list[float]:
    """Relative errors of the blocks' outputs, each model on activations of its own.

    The mean over tokens, of which none counts as more than lost: a few are a thousand times as
    large as the others.
    """
    cpu = torch.device("cpu")
    models = [Blocks(one, torch.float32, cpu) for one in (dense, trained)]
    hidden = [model.embed(tokens) for model in models]
    errors = []
    for index in range(len(models[0])):
        for which, model in enumerate(models):
            hidden[which] = model.run(index, model.make(index), hidden[which])
            model.release(index)
        wanted, found = hidden
        errors.append(lost_share(relative_errors(found, wanted).sqrt()))
    return errors


def _page(found: dict[str, Any]) -> Page:
    results, history, layers = found["results"], found["history"], found["layers"]
    facts = {
        "steps": f"{results['steps']:,} of {results['tokens']:,} tokens in all",
        "schemes": ", ".join(sorted({layer["scheme"] for layer in layers})) or "dense",
    }
    if results.get("eval_perplexity") is not None:
        tokens = results["eval_tokens"]
        facts["held out"] = f"perplexity {results['eval_perplexity']:.2f}, {tokens:,} tokens"
    if results.get("train_runtime"):
        rate = results["tokens"] / results["train_runtime"]
        facts["end to end"] = f"{results['train_runtime']:.0f} s, {rate:,.0f} tokens/s"
    charts = []
    line = [(row["step"], row["loss"]) for row in history if 0 < row["loss"] < math.inf]
    if len(line) > 1:
        charts.append(line_chart("Loss", "step", "loss", {"training": line}, linear="x"))
    errors = [
        (index + 1, error)
        for index, error in enumerate(found["block_errors"])
        if 0 < error < math.inf
    ]
    if errors:
        charts.append(
            line_chart("Error of outputs", "block", "of its norm", {"run": errors}, linear="xy")
        )
    kinds: dict[str, list[tuple[float, float]]] = {}
    for layer in layers:
        kind = layer["layer"].rpartition(".")[2]
        line = kinds.setdefault(kind, [])
        line.append((len(line) + 1, layer["scales"][1]))
    if kinds:
        charts.append(line_chart("Median scales", "block", "scale", kinds, linear="x"))
    headings = ("layer", "scheme", "codes", "codes, %", "scales", "least", "median", "largest")
    rows = [
        [
            *(layer["layer"], layer["scheme"], _bars(layer["codes"])),
            " ".join(f"{100 * share:.0f}" for share in layer["codes"]),
            _bars(layer["scale_histogram"]),
            *layer["scales"],
            *(100 * layer["changed"], 100 * layer["weight_error"]),
        ]
        for layer in layers
    ]
    notes = [
        "Codes: how many weights have each, lowest first (of some rows, in large layers). Scales: "
        "how many lie in each sixteenth of their range, on a logarithmic axis. Changed: "
        "codes that differ from those of the dense weights rounded by the same scales. Errors are "
        "of norms: of a layer's weights, and of what comes out of a block on held-out text, both "
        "models on their own activations; "
        f"the median block's is {statistics.median(found['block_errors'] or [0.0]):.1%}.",
    ]
    table = Table("Layers", (*headings, "changed, %", "weight error, %"), rows)
    return Page("Training", facts, None, [table], charts, notes)
