"""Which formats hold a model exactly: what a refusal names."""

from qexport.checkpoint import Checkpoint
from qexport.errors import QexportError
from qexport.formats.base import Format, Options
from qexport.formats.registry import FORMATS

__all__ = ["holders"]


def holders(source: Checkpoint) -> list[str]:
    """Every format that holds all matrices exactly, as a user asks for it.

    For a run of one scheme with the widths that hold it; for several, each in its own width, or
    with the `--bits` that holds them all where a format has one width alone.
    """
    mixed = len({scheme for scheme, _ in source.modules.values()}) > 1
    found = []
    for form in FORMATS.values():
        widths = sorted({grid.bits for grid in form.grids})
        held = [bits for bits in widths if _holds(source, form, Options(bits=bits))]
        if mixed and _holds(source, form, Options()):
            found.append(form.name)
        elif mixed and held:
            found.append(f"{form.name} --bits {held[0]}")
        elif held:
            found.append(f"{form.name} ({', '.join(map(str, held))} bits)")
    return found


def _holds(source: Checkpoint, form: Format, options: Options) -> bool:
    """Whether a format holds every matrix, and has words for the model that they are of."""
    matrices = set(source.modules.values())
    verdicts = {matrix: form.verdict(*matrix, options) for matrix in matrices}
    if not all(verdict.exact for verdict in verdicts.values()):
        return False
    plan = {module: verdicts[matrix] for module, matrix in source.modules.items()}
    try:
        form.layout(source, plan, options)
    except QexportError:
        return False
    return True
