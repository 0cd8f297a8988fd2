import itertools

import pytest
import torch

from qexport.errors import CheckpointError
from qexport.grid import (
    BINARY,
    GRIDS,
    INT2,
    INT3,
    INT4,
    INT8,
    SEQ2,
    TERNARY,
    UINT4,
    UINT8,
    Grid,
    Scheme,
)
from qexport.tensor import QuantizedTensor


def levels(grid: Grid, factor: int = 1) -> list[float]:
    assert grid.zero is not None
    return [(code - grid.zero) / factor for code in range(grid.levels)]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (BINARY, [-0.5, 0.5]),
        (TERNARY, [-1, 0, 1]),
        (SEQ2, [-1.5, -0.5, 0.5, 1.5]),
        (INT2, [-2, -1, 0, 1]),
        (INT3, [-4, -3, -2, -1, 0, 1, 2, 3]),
    ],
)
def test_levels(grid: Grid, expected: list[float]) -> None:
    assert levels(grid) == expected


def test_widths() -> None:
    assert [GRIDS[name].bits for name in ("binary", "ternary", "seq2", "int3", "int4")] == [
        1,
        2,
        2,
        3,
        4,
    ]


def every_code(grid: Grid) -> QuantizedTensor:
    """All codes of a grid in each row; a row for every zero point where the grid has none."""
    zeros = None if grid.zero is not None else torch.arange(grid.levels, dtype=torch.uint8)[:, None]
    rows = 1 if zeros is None else grid.levels
    codes = torch.arange(grid.levels).to(torch.uint8).repeat(rows, 1)
    scales = torch.ones(rows, 1, dtype=torch.float16)
    return QuantizedTensor(codes, scales, Scheme(grid), zeros)


def holds(wide: Grid, values: set[float]) -> bool:
    """Whether a zero point and a step of 1 or 1/2 of `wide` have all `values`, by trying."""
    zeros = [wide.zero] if wide.zero is not None else [float(z) for z in range(wide.levels)]
    return any(
        values <= {(code - zero) / factor for code in range(wide.levels)}
        for zero in zeros
        for factor in (1, 2)
    )


UNIFORM = [grid for grid in GRIDS.values() if grid.uniform]


def test_grids_that_are_not_uniform_embed_in_themselves_alone() -> None:
    for narrow, wide in itertools.product(GRIDS.values(), repeat=2):
        if not (narrow.uniform and wide.uniform):
            assert narrow.factor_into(wide) == (1 if narrow == wide else None)


@pytest.mark.parametrize(("narrow", "wide"), list(itertools.product(UNIFORM, repeat=2)))
def test_an_embedding_keeps_every_value_and_none_is_missed(narrow: Grid, wide: Grid) -> None:
    tensor = every_code(narrow)
    if narrow.factor_into(wide) is not None:
        held = tensor.embed(wide)
        assert held.scheme.grid == wide
        assert int(held.codes.max()) < wide.levels
        assert torch.equal(held.dequantize(), tensor.dequantize())
    else:
        with pytest.raises(ValueError, match="does not embed"):
            tensor.embed(wide)
        rows = [set(row.tolist()) for row in tensor.dequantize()]
        # binary's two values fit every grid at some zero point that is not its middle
        assert not all(holds(wide, row) for row in rows) or wide.zero is None


@pytest.mark.parametrize(
    ("narrow", "wide", "expected"),
    [
        (SEQ2, INT2, None),
        (SEQ2, INT3, [1, 3, 5, 7]),
        (SEQ2, INT4, [5, 7, 9, 11]),
        (SEQ2, UINT4, [5, 7, 9, 11]),
        (TERNARY, INT2, [1, 2, 3]),
        (BINARY, INT2, [1, 3]),
        (INT3, INT4, [4, 5, 6, 7, 8, 9, 10, 11]),
        (INT2, INT8, [126, 127, 128, 129]),
        (UINT4, INT4, None),
        (UINT8, INT8, None),
    ],
)
def test_known_embeddings(narrow: Grid, wide: Grid, expected: list[int] | None) -> None:
    if expected is None:
        assert narrow.factor_into(wide) is None
    else:
        assert every_code(narrow).embed(wide).codes.tolist() == [expected]


def test_a_scheme_survives_json() -> None:
    for grid, group, dtype in itertools.product(
        GRIDS.values(), (None, 64), (torch.float16, torch.float32)
    ):
        scheme = Scheme(grid, group, dtype)
        assert Scheme.from_json(scheme.to_json()) == scheme


@pytest.mark.parametrize(
    "change", [{"grid": "nf9"}, {"group_size": 0}, {"group_size": "64"}, {"scale_dtype": "int8"}]
)
def test_an_unknown_scheme_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="not one this version knows"):
        Scheme.from_json({**Scheme(SEQ2, 64).to_json(), **change})


def test_bits_per_weight_counts_scales() -> None:
    assert Scheme(SEQ2, 64).bits_per_weight(576) == 2.25
    assert Scheme(INT4, None).bits_per_weight(1024) == 4 + 16 / 1024
    assert Scheme(UINT4, 128).bits_per_weight(1024) == 4 + (16 + 4) / 128
