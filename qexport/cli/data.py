"""`qexport data`."""

import json
from pathlib import Path
from typing import Any

import click

from qexport.cli.common import Command, progress_console
from qexport.cli.serving import engine_options
from qexport.errors import InputError

_EPILOG = """\b
Examples:
  qexport data generate ./SmolLM2-135M -o generated.jsonl --tokens 200000
  qexport train ./SmolLM2-135M --data generated.jsonl --bits 2 --group-size 64 -o run"""


@click.group(epilog=_EPILOG)
def command() -> None:
    """Make text to train on."""


@command.command(cls=Command, epilog=_EPILOG)
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="JSONL file.")
@click.option("--tokens", default=1_000_000, show_default=True, type=click.IntRange(1))
@click.option("--length", default=512, show_default=True, type=click.IntRange(8), help="Tokens.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1, 1024))
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(min=0))
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1))
@engine_options
def generate(
    model: str,
    output: Path,
    tokens: int,
    length: int,
    batch: int,
    temperature: float,
    top_p: float,
    seed: int,
    serving: dict[str, Any],
) -> None:
    """Let MODEL, a folder or hub id, write its own training text, as LLM-QAT does.

    What a killed command has written is taken up by the same command.
    """
    from qexport.hub import local_folder
    from qexport.output import growing_file
    from qexport.run_folder import model_state
    from qexport.runtime.corpus import CorpusSettings, generated_documents
    from qexport.runtime.serving import Serving, open_generator

    if output.suffix != ".jsonl":
        raise InputError(f"{output} is to hold JSONL; call it {output.with_suffix('.jsonl')}.")
    folder = local_folder(model)
    settings = CorpusSettings(length, temperature=temperature, top_p=top_p, seed=seed)
    console = progress_console()
    identity = f"{folder.resolve()} {model_state(folder)} {settings} {serving}"
    with growing_file(output, identity) as (file, lines):
        made = sum(json.loads(line)["tokens"] for line in lines)
        opened = Serving(**serving, slots=batch, context=length)
        with open_generator(folder, opened, waiting=2 * batch) as generator:
            for number, (text, count) in enumerate(
                generated_documents(generator, settings, len(lines)), len(lines)
            ):
                if made >= tokens:
                    break
                row = json.dumps({"text": text, "tokens": count}, ensure_ascii=False)
                file.write(f"{row}\n".encode())
                made += count
                if number % batch == 0:
                    console.print(f"{made:,} of {tokens:,} tokens", highlight=False)
    click.echo(f"{output}: {made:,} tokens")
