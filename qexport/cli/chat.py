"""`qexport chat`."""

import sys
from pathlib import Path

import click

from qexport.cli.common import Command, progress_console

_EPILOG = """\b
Example:
  qexport chat packed --temperature 0.7"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--system", help="A system message to begin with.")
@click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0))
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto"
)
def command(
    path: Path, system: str | None, max_tokens: int, temperature: float, dtype: str
) -> None:
    """Talk to the model at PATH. An empty line or Ctrl-D ends it."""
    from qexport.runtime.generator import Generator, Sampling
    from qexport.runtime.loader import open_model

    model, tokenizer, _ = open_model(path, dtype)
    generator = Generator(model, tokenizer)
    console = progress_console()
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        console.print("> ", end="")
        question = sys.stdin.readline().strip()
        if not question:
            return
        messages.append({"role": "user", "content": question})
        answer = ""
        prompt = generator.encode_chat(messages)
        room = max(1, min(max_tokens, generator.context - len(prompt)))
        for piece in generator.stream(prompt, Sampling(room, temperature)):
            answer += piece.text
            click.echo(piece.text, nl=False)
        click.echo()
        messages.append({"role": "assistant", "content": answer})
