"""Widths as people name them, and the grids that they mean."""

__all__ = ["GRID_OF"]

GRID_OF: dict[str, tuple[str, str | None]] = {  # names of the symmetric grid and of the other
    **{"1": ("binary", None), "1.58": ("ternary", None), "2": ("seq2", "uint2")},
    **{"3": ("int3", "uint3"), "4": ("int4", "uint4"), "5": ("int5", None)},
    **{"6": ("int6", None), "8": ("int8", "uint8")},
}
