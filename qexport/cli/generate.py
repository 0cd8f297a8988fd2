"""`qexport generate`."""

from pathlib import Path

import click

from qexport.cli.common import Command

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
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto"
)
def command(
    path: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    dtype: str,
) -> None:
    """Continue a prompt with the model at PATH; the text goes to stdout as it is made."""
    from qexport.runtime.generator import Generator, Sampling
    from qexport.runtime.loader import open_model

    model, tokenizer, _ = open_model(path, dtype)
    generator = Generator(model, tokenizer)
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    for piece in generator.stream(generator.encode(prompt), sampling):
        click.echo(piece.text, nl=False)
    click.echo()
