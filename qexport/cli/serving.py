"""The options of every command that runs a model."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

__all__ = ["serving_options"]

_NAMES = ("kernel", "head_bits", "cache", "context", "threads", "dtype")
_OPTIONS = (
    click.option(
        "--kernel",
        help="cpu, cpu-exact (float32 activations), cuda, triton, humming or reference; "
        "see qexport doctor.",
    ),
    click.option(
        "--head-bits",
        type=click.Choice(["8", "4"]),
        help="Round the matrix that makes logits to int8 or int4: faster, and no longer exact.",
    ),
    click.option(
        "--kv-cache",
        "cache",
        type=click.Choice(["float16", "bfloat16", "float32", "int8"]),
        default="float16",
        show_default=True,
        help="How keys and values are kept on the CPU.",
    ),
    click.option(
        "--context",
        type=click.IntRange(min=16),
        help="Tokens of a sequence; default the model's, as far as memory goes.",
    ),
    click.option("--threads", type=click.IntRange(1, 1024), help="Default: as many as cores."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        help="Of activations on a GPU, in the reference and in transformers' models.",
    ),
)


def serving_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options; the command gets them as `serving`, the fields of `runtime.Serving`."""

    @wraps(command)
    def gathered(**arguments: Any) -> None:
        serving = {name: arguments.pop(name) for name in _NAMES}
        if serving["head_bits"]:
            serving["head_bits"] = int(serving["head_bits"])
        command(**arguments, serving=serving)

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return gathered
