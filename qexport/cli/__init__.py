"""The `qexport` command. Subcommands, one file each, are imported only when they are called."""

import importlib
import sys

import click

from qexport.cli import interrupts
from qexport.cli.common import fail
from qexport.errors import QexportError
from qexport.version import __version__

__all__ = ["main"]

# Listed in the order in which one uses them; the text is here so that --help imports nothing.
COMMANDS = {
    "data": "Let a model write its own training text.",
    "train": "Train a model on a low-bit grid (ParetoQ QAT) into a RUN.",
    "quantize": "Quantize a model without training it (GPTQ, AWQ, …) into a RUN.",
    "pack": "Write a RUN in a format that engines read, and verify it.",
    "verify": "Prove that a packed checkpoint is, bit for bit, its source.",
    "formats": "Show how every format holds every grid, and at how many bits.",
    "plan": "Reckon sizes, memory, engines and times of a model on a GPU or CPU.",
    "inspect": "Show schemes, bits per weight and sizes of any checkpoint.",
    "eval": "Measure perplexity, and divergence from a reference.",
    "generate": "Continue a prompt.",
    "chat": "Talk to a model in the terminal.",
    "serve": "Serve a checkpoint over OpenAI's HTTP protocol.",
    "bench": "Measure latency beside other engines, kernels, or a server under load.",
    "doctor": "Show what this machine has to work with.",
}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"qexport.cli.{name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Group,
    context_settings={"auto_envvar_prefix": "QEXPORT", "help_option_names": ["-h", "--help"]},
    epilog="\b\nExample:\n  qexport train --smoke",
)
@click.version_option(__version__, prog_name="qexport")
def group() -> None:
    """Train, pack, prove and serve low-bit language models.

    The model served is, bit for bit, the model trained. Results go to stdout, progress to stderr.
    Exit codes: 0 done, 1 failed, 2 usage, 3 verification failed, 4 unsupported here, 130 interrupt.
    """


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence, not a traceback."""
    interrupts.install()
    try:
        code = group.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except QexportError as error:
        fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        known = str(cause) if isinstance(cause, KeyboardInterrupt) else ""
        fail(f"interrupted; {known}" if known else "interrupted.", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        fail(f"{error.filename or 'the system'}: {error.strerror or error}.", 1)
