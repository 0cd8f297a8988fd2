"""Which formats hold a model exactly: what a refusal names."""

from qexport.checkpoint import Checkpoint
from qexport.errors import QexportError
from qexport.formats.base import Format, Options
from qexport.formats.registry import FORMATS

__all__ = ["holders"]


def holders(source: Checkpoint) -> list[str]:
    """Every format and width that holds all matrices exactly, as one writes them."""
    matrices = set(source.modules.values())
    found = []
    for form in FORMATS.values():
        widths = sorted({grid.bits for grid in form.grids})
        held = [
            bits
            for bits in widths
            if all(form.verdict(*matrix, Options(bits=bits)).exact for matrix in matrices)
        ]
        if held and _can_say(source, form, Options(bits=held[0])):
            found.append(f"{form.name} ({', '.join(map(str, held))} bits)")
    return found


def _can_say(source: Checkpoint, form: Format, options: Options) -> bool:
    """Whether a format that holds every matrix also has words for the model that they are of."""
    modules = source.modules.items()
    plan = {module: form.verdict(scheme, shape, options) for module, (scheme, shape) in modules}
    try:
        form.layout(source, plan, options)
    except QexportError:
        return False
    return True
