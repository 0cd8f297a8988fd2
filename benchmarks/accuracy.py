"""Perplexity of SmolLM2 after half an hour of training on two cores, at every width.

`python -m benchmarks.accuracy [--width 2 ...]` trains in groups of 64 on CPython's language
reference and on text that the dense model wrote, and evaluates on held-out text of both. Rows:

dense       as it is
fine-tuned  dense, trained on as many of the same tokens: what the others may be compared with, or
            adapting to the text would be taken for quality of quantization
RTN         rounded, scales by least squares
end to end  trained without a start, in the same time as the next one
QAT         by the `fast` recipe: GPTQ's rounding, block by block, then end to end

Every row is recorded as soon as it is there, and is not made again (remove it from the JSON for
that): a width takes half an hour.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.demo import OUTPUT, fetch
from benchmarks.machine import place, record
from qexport.data import documents, tokenize
from qexport.evaluate import evaluate
from qexport.runtime.loader import open_model
from qexport.training import TrainConfig, train

NAME = "accuracy-smollm2"
WIDTHS = ("4", "3", "2", "1.58", "1")
WINDOW = 256
GROUP = 64
BATCH = 8
TOKENS = {"train": 200_000, "eval": 20_000}  # that the model writes
STEPS = 120  # end to end
console = Console(stderr=True)


def generated(split: str) -> Path:
    """Text of the dense model's own, through the command that users have."""
    from click.testing import CliRunner

    from qexport.cli.data import generate

    path = OUTPUT / f"generated-{split}.jsonl"
    if not path.exists():
        asked = ["--tokens", str(TOKENS[split]), "--length", str(WINDOW)]
        seed = str(list(TOKENS).index(split))
        result = CliRunner().invoke(
            generate, [str(fetch()), "-o", str(path), *asked, "--seed", seed]
        )
        assert result.exit_code == 0, result.output
    return path


def trained(name: str, **settings: Any) -> dict[str, Any]:
    """A run, and what it costs and is worth."""
    config = TrainConfig(
        model=fetch(),
        data=("builtin", str(generated("train"))),
        eval_data="builtin",
        output=OUTPUT / "accuracy" / name,
        group_size=GROUP,
        max_length=WINDOW,
        batch_size=BATCH,
        save_steps=50,
        **settings,
    )
    start = time.monotonic()
    results = train(config, console)
    return {
        "minutes": (time.monotonic() - start) / 60,
        "steps": results["steps"],
        "tokens": results["tokens"],
        "train_seconds": results["train_runtime"],
        **perplexities(config.output),
    }


def perplexities(folder: Path) -> dict[str, float]:
    """On held-out text of both kinds, every token predicted once."""
    model, tokenizer, _ = open_model(folder, "bfloat16")
    found = {}
    for name, source in (("builtin", "builtin"), ("generated", str(generated("eval")))):
        tokens = tokenize(list(documents(source, "eval", tokenizer)), tokenizer)
        found[name] = evaluate(model, tokens, WINDOW).perplexity
    return found


Row = Callable[[dict[str, Any]], dict[str, Any]]  # of the rows that are there already


def dense_rows() -> dict[str, Row]:
    """As it is, and trained on the tokens that the others train on."""
    return {
        "dense": lambda _: {"minutes": 0.0, "tokens": 0, **perplexities(fetch())},
        "fine-tuned": lambda _: trained("16", bits="16", recipe="fast", max_steps=STEPS),
    }


def width_rows(bits: str) -> dict[str, Row]:
    """RTN, and the whole recipe."""
    return {
        f"{bits} RTN": lambda _: trained(f"{bits}-rtn", bits=bits, max_steps=0),
        f"{bits} QAT": lambda _: trained(f"{bits}-qat", bits=bits, recipe="fast", max_steps=STEPS),
    }


def alone_row(bits: str) -> dict[str, Row]:
    """End to end alone, in as much time."""

    def alone(done: dict[str, Any]) -> dict[str, Any]:
        whole = done[f"{bits} QAT"]
        steps = round(STEPS * whole["minutes"] * 60 / whole["train_seconds"])
        return trained(f"{bits}-end", bits=bits, recipe="fast", phase="end", max_steps=steps)

    return {f"{bits} end to end": alone}


def main() -> None:
    """Make what rows are lacking, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", nargs="*", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--rows", nargs="*", help="these alone: dense, '2 QAT', '2 end to end', …")
    asked = parser.parse_args()
    kept = place(NAME)
    done: dict[str, Any] = json.loads(kept.read_text())["rows"] if kept.exists() else {}
    rows = dense_rows()
    for bits in asked.width:
        rows |= width_rows(bits)
    for bits in asked.width:
        rows |= alone_row(bits)
    for name, make in rows.items():
        if name not in done and (not asked.rows or name in asked.rows):
            console.print(f"[{name}]", markup=False)
            done[name] = make(done)
            record(NAME, {"window": WINDOW, "group_size": GROUP, "rows": done})
    show(done)


def show(done: dict[str, Any]) -> None:
    """The table of what is there."""
    tuned = done["fine-tuned"]["builtin"] if "fine-tuned" in done else float("nan")
    for name, row in done.items():
        figures = f"builtin {row['builtin']:.2f}, {row['builtin'] / tuned:.2f} of fine-tuned; "
        figures += f"generated {row['generated']:.2f}; {row['tokens']:,} tokens"
        console.print(f"{name:18} {figures}, {row['minutes']:.1f} min")


if __name__ == "__main__":
    main()
