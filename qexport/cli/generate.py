"""`qexport generate`."""

import sys
from pathlib import Path
from typing import Any

import click

from qexport.cli.common import Command
from qexport.cli.serving import serving_options

_EPILOG = """\b
Example:
  qexport generate packed -p "The capital of France is" --max-tokens 20"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="Text to continue; - reads standard input.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Default: 128, or what the context has left."
)
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0))
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", type=click.IntRange(0, 2**63 - 1))
@serving_options
def command(
    path: Path,
    prompt: str,
    max_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int | None,
    serving: dict[str, Any],
) -> None:
    """Continue a prompt with the model at PATH; the text goes to stdout as it is made."""
    from qexport.runtime.generator import Sampling
    from qexport.runtime.serving import Serving, open_generator

    if prompt == "-":
        prompt = sys.stdin.read()
    with open_generator(path, Serving(**serving)) as generator:
        tokens = generator.encode(prompt)
        sampling = Sampling(max_tokens or generator.room(tokens), temperature, top_p, seed)
        for piece in generator.stream(tokens, sampling):
            click.echo(piece.text, nl=False)
    click.echo()
