"""From --bits and --group-size to a scheme."""

from typing import TYPE_CHECKING

from qexport.errors import InputError
from qexport.widths import GRID_OF

if TYPE_CHECKING:
    from qexport.grid import Scheme

__all__ = ["scheme_of"]


def scheme_of(bits: str, group_size: int) -> "Scheme":
    """Raises InputError for a width or a group that there is not; -1 is one scale per channel."""
    from qexport.grid import GRIDS, Scheme

    if bits not in GRID_OF:
        raise InputError(f"--bits {bits}: there are {', '.join(GRID_OF)}.")
    if group_size < 1 and group_size != -1:
        raise InputError("--group-size is positive, or -1 for one scale per channel.")
    return Scheme(GRIDS[GRID_OF[bits][0]], None if group_size == -1 else group_size)
