"""From --bits and --group-size to a scheme."""

from typing import TYPE_CHECKING

from qexport.errors import InputError

if TYPE_CHECKING:
    from qexport.grid import Scheme

__all__ = ["BITS", "scheme_of"]

BITS = {
    **{"1": "binary", "1.58": "ternary", "2": "seq2", "3": "int3", "4": "int4"},
    **{"5": "int5", "6": "int6", "8": "int8"},
}


def scheme_of(bits: str, group_size: int) -> "Scheme":
    """Raises InputError for a width or a group that there is not; -1 is one scale per channel."""
    from qexport.grid import GRIDS, Scheme

    if bits not in BITS:
        raise InputError(f"--bits {bits}: there are {', '.join(BITS)}.")
    if group_size < 1 and group_size != -1:
        raise InputError("--group-size is positive, or -1 for one scale per channel.")
    return Scheme(GRIDS[BITS[bits]], None if group_size == -1 else group_size)
