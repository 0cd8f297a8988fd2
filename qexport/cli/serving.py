"""The options of every command that runs a model."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

__all__ = ["engine_options", "serving_options"]

_OPTIONS = {
    "kernel": click.option(
        "--kernel",
        help="cpu, cpu-exact (float32 activations), cuda, triton, humming or reference; "
        "see qexport doctor.",
    ),
    "head_bits": click.option(
        "--head-bits",
        type=click.Choice(["8", "4"]),
        help="Round the matrix that makes logits to int8 or int4: faster, and no longer exact.",
    ),
    "cache": click.option(
        "--kv-cache",
        "cache",
        type=click.Choice(["float16", "bfloat16", "float32", "int8"]),
        default="float16",
        show_default=True,
        help="How keys and values are kept on the CPU.",
    ),
    "context": click.option(
        "--context",
        type=click.IntRange(min=16),
        help="Tokens of a sequence; default the model's, as far as memory goes.",
    ),
    "threads": click.option(
        "--threads", type=click.IntRange(1, 1024), help="Default: as many as cores."
    ),
    "dtype": click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        help="Of activations on a GPU, in the reference and in transformers' models.",
    ),
}


def serving_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options; the command gets them as `serving`, the fields of `runtime.Serving`."""
    return _with(command, tuple(_OPTIONS))


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """The same without --context, which follows from what such a command runs."""
    return _with(command, tuple(name for name in _OPTIONS if name != "context"))


def _with(command: Callable[..., None], names: tuple[str, ...]) -> Callable[..., None]:
    @wraps(command)
    def gathered(**arguments: Any) -> None:
        serving = {name: arguments.pop(name) for name in names}
        if serving["head_bits"]:
            serving["head_bits"] = int(serving["head_bits"])
        command(**arguments, serving=serving)

    for name in reversed(names):
        gathered = _OPTIONS[name](gathered)
    return gathered
