import itertools

import pytest
import torch

from qexport.errors import CheckpointError
from qexport.grid import BINARY, GRIDS, INT2, INT3, INT4, INT8, SEQ2, TERNARY, UINT4, Grid, Scheme


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


@pytest.mark.parametrize(("narrow", "wide"), list(itertools.product(GRIDS.values(), repeat=2)))
def test_an_embedding_keeps_every_level(narrow: Grid, wide: Grid) -> None:
    found = narrow.embedding(wide)
    if narrow.zero is None or wide.zero is None:
        assert found == ((1, 0) if narrow == wide else None)
    elif found is not None:
        factor, offset = found
        codes = [code * factor + offset for code in range(narrow.levels)]
        assert all(0 <= code < wide.levels for code in codes)
        assert [levels(wide, factor)[code] for code in codes] == levels(narrow)
    else:
        for factor in (1, 2):  # no exact re-coding was missed
            assert not set(levels(narrow)) <= set(levels(wide, factor))


@pytest.mark.parametrize(
    ("narrow", "wide", "expected"),
    [
        (SEQ2, INT2, None),
        (SEQ2, INT3, (2, 1)),  # codes 1, 3, 5, 7
        (SEQ2, INT4, (2, 5)),  # codes 5, 7, 9, 11
        (TERNARY, INT2, (1, 1)),
        (BINARY, INT2, (2, 1)),
        (INT3, INT4, (1, 4)),
        (INT4, INT8, (1, 120)),
        (INT4, UINT4, None),
    ],
)
def test_known_embeddings(narrow: Grid, wide: Grid, expected: tuple[int, int] | None) -> None:
    assert narrow.embedding(wide) == expected


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
