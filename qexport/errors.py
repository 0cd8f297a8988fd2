"""Every error that qexport raises on purpose.

QexportError                  exit 1   the job failed
├── CheckpointError           exit 1   a checkpoint is damaged, unsafe or not one we read
├── DataError                 exit 1   training or evaluation text that cannot be used
├── RefusedError              exit 1   a format cannot hold these weights exactly
├── InputError                exit 2   what the user typed does not fit
├── VerificationError         exit 3   an artefact differs from its source
└── UnsupportedError          exit 4   this hardware or engine cannot

The text of each is one sentence that says what is wrong and what to do. The command line
prints it alone; a traceback means a bug of ours.
"""

__all__ = [
    "CheckpointError",
    "DataError",
    "InputError",
    "QexportError",
    "RefusedError",
    "UnsupportedError",
    "VerificationError",
]


class QexportError(Exception):
    """Base class; `exit_code` is what the command line ends with."""

    exit_code = 1


class CheckpointError(QexportError):
    """A checkpoint is damaged, unsafe to read, or of a kind that we do not read."""


class DataError(QexportError):
    """Text for training or evaluation that is empty, malformed or too short."""


class RefusedError(QexportError):
    """A format cannot hold these weights exactly; the text names those that can."""


class InputError(QexportError):
    """An argument that is wrong by itself or does not fit the model."""

    exit_code = 2


class VerificationError(QexportError):
    """An artefact is not, bit for bit, its source."""

    exit_code = 3


class UnsupportedError(QexportError):
    """This machine, or the engine asked for, cannot do it."""

    exit_code = 4


def first_line(error: Exception) -> str:
    """What another library's error says first, short enough for a sentence of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, *rest = lines or [type(error).__name__]
    return " ".join((first, *rest[:1]) if first.endswith(":") else (first,))[:200].rstrip(",")
