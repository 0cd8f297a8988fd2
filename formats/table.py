"""The table of verdicts: the usual grids and group sizes against every format."""

from typing import Any

import torch

from qexport.formats.base import Options
from qexport.formats.registry import FORMATS
from qexport.grid import (
    BINARY,
    INT3,
    INT4,
    INT8,
    NF4,
    SEQ2,
    TERNARY,
    UINT4,
    Scheme,
)

__all__ = ["GROUPS", "TABLE_GRIDS", "verdict_table"]

TABLE_GRIDS = (BINARY, TERNARY, SEQ2, INT3, INT4, INT8, NF4, UINT4)
GROUPS = (None, 32, 64, 128, 256)


def verdict_table(shape: tuple[int, int]) -> list[dict[str, Any]]:
    """A row for each grid and group size that divides a matrix [out, in], a cell for each format.

    A cell is {verdict, stored, bits_per_weight, reason}: what `Format.verdict` says.
    """
    rows = []
    for grid in TABLE_GRIDS:
        for group in GROUPS:
            if group is not None and shape[1] % group:
                continue
            # NF4 as `quantize --method nf4` makes it
            own = (torch.float32, None, True) if grid is NF4 else (torch.float16,)
            scheme = Scheme(grid, group, *own)
            cells = {}
            for name, form in FORMATS.items():
                verdict = form.verdict(scheme, shape, Options())
                cells[name] = {
                    "verdict": verdict.kind(scheme),
                    "stored": verdict.stored,
                    "bits_per_weight": verdict.bits_per_weight,
                    "reason": verdict.reason,
                }
            rows.append({"grid": grid.name, "group_size": group, "formats": cells})
    return rows
