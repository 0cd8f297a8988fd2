"""`qexport chat`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qexport.cli.common import Command, progress_console
from qexport.cli.serving import serving_options
from qexport.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qexport.runtime.engine import Ticket

_EPILOG = """\b
Example:
  qexport chat packed --temperature 0.7"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--system", help="A system message to begin with.")
@click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0))
@serving_options
def command(
    path: Path, system: str | None, max_tokens: int, temperature: float, serving: dict[str, Any]
) -> None:
    """Talk to the model at PATH.

    Ctrl-C stops an answer, /reset forgets the conversation, an empty line or Ctrl-D ends it.
    """
    from qexport.runtime.generator import Sampling
    from qexport.runtime.serving import Serving, open_generator

    console = progress_console()
    begin = [{"role": "system", "content": system}] if system else []
    messages = list(begin)
    with open_generator(path, Serving(**serving)) as generator:
        if not generator.has_template:
            raise InputError("this model has no chat template; use qexport generate.")
        while True:
            console.print("> ", end="")
            question = sys.stdin.readline().strip()
            if not question:
                return
            if question == "/reset":
                messages = list(begin)
                continue
            asked = {"role": "user", "content": question}
            try:
                prompt = generator.encode_chat([*messages, asked])
                sampling = Sampling(generator.room(prompt, max_tokens), temperature)
                ticket = generator.stream(prompt, sampling)
            except InputError as error:  # the conversation so far stays
                console.print(f"{error} Ask otherwise, or begin anew with /reset.", markup=False)
                continue
            messages += [asked, {"role": "assistant", "content": _show(ticket, console)}]


def _show(ticket: "Ticket", console: "Console") -> str:
    """Print an answer as it is made; Ctrl-C ends it, and what was said so far stays."""
    answer, reason = "", None
    try:
        for piece in ticket:
            answer, reason = answer + piece.text, piece.finish_reason
            click.echo(piece.text, nl=False)
    except KeyboardInterrupt:
        ticket.close()
    click.echo()
    if reason == "length":
        console.print("(cut here: --max-tokens, or the context is full; /reset empties it)")
    return answer
