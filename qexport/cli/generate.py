"""`qexport generate`."""

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
@click.option("-p", "--prompt", required=True)
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0))
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", type=click.IntRange(0, 2**63 - 1))
@serving_options
def command(
    path: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    serving: dict[str, Any],
) -> None:
    """Continue a prompt with the model at PATH; the text goes to stdout as it is made."""
    from qexport.runtime.generator import Sampling
    from qexport.runtime.serving import Serving, open_generator

    sampling = Sampling(max_tokens, temperature, top_p, seed)
    with open_generator(path, Serving(**serving)) as generator:
        for piece in generator.stream(generator.encode(prompt), sampling):
            click.echo(piece.text, nl=False)
    click.echo()
