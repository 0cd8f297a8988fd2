"""`qexport verify`."""

from pathlib import Path

import click

from qexport.cli.common import Command, json_option, print_json
from qexport.errors import VerificationError

_EPILOG = """\b
Example:
  qexport verify run packed && echo identical"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@json_option
def command(run: Path, out: Path, as_json: bool) -> None:
    """Prove that OUT is, bit for bit, RUN: exit 0 if exact, 3 if not.

    Codes are compared as the file's own reader decodes them, dequantized values by their bits, and
    every other tensor, the config and the tokenizer for equality.
    """
    from qexport.formats import open_checkpoint
    from qexport.formats.verify import verify

    report = verify(open_checkpoint(run), open_checkpoint(out))
    if as_json:
        print_json(report.to_json())
    else:
        click.echo(report.describe())
    if not report.exact:
        raise VerificationError(f"{out} is not, bit for bit, {run}.")
