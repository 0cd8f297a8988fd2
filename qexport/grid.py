"""What a code means (`Grid`) and how a weight matrix is quantized (`Scheme`)."""

from dataclasses import dataclass
from typing import Any

import torch

from qexport.errors import CheckpointError

__all__ = [
    "BINARY",
    "GRIDS",
    "INT2",
    "INT3",
    "INT4",
    "INT5",
    "INT6",
    "INT8",
    "SEQ2",
    "SUPER_BLOCKS",
    "TERNARY",
    "UINT2",
    "UINT3",
    "UINT4",
    "UINT8",
    "Grid",
    "Scheme",
    "SuperBlock",
    "dtype_name",
]


@dataclass(frozen=True)
class Grid:
    """A uniform grid, unitless: code `c` in `0 .. levels-1` means `c - zero`.

    `zero` may be half-integer: ParetoQ's SEQ grid is 0..3 about 1.5. None means that every group
    has a zero point of its own (asymmetric quantization).
    """

    name: str
    levels: int
    zero: float | None

    @property
    def bits(self) -> int:
        """Bits that one code takes in a dense stream."""
        return (self.levels - 1).bit_length()

    def factor_into(self, wider: "Grid") -> int | None:
        """1 or 2 if every value here is one of `wider` at the scale divided by it, else None.

        The portable scales of this project keep their halves exact, so that half-integer grids
        go into integer ones at half the step. Zero points per group go into a symmetric grid as
        `code - zero`; a symmetric grid goes into an asymmetric one about its middle.
        """
        if self.zero is None:
            reach = self.levels - 1
            if wider.zero is None:
                return 1 if self.levels <= wider.levels else None
            whole = wider.zero % 1 == 0
            return 1 if whole and reach <= min(wider.zero, wider.levels - 1 - wider.zero) else None
        for factor in (1, 2):
            shift = wider.middle - self.zero * factor
            top = (self.levels - 1) * factor + shift
            if shift % 1 == 0 and shift >= 0 and top <= wider.levels - 1:
                return factor
        return None

    @property
    def middle(self) -> float:
        """The zero point, or the one that a symmetric grid takes among this grid's own."""
        return self.levels // 2 if self.zero is None else self.zero


BINARY = Grid("binary", 2, 0.5)
TERNARY = Grid("ternary", 3, 1.0)
SEQ2 = Grid("seq2", 4, 1.5)
INT2 = Grid("int2", 4, 2.0)
INT3 = Grid("int3", 8, 4.0)
INT4 = Grid("int4", 16, 8.0)
INT5 = Grid("int5", 32, 16.0)
INT6 = Grid("int6", 64, 32.0)
INT8 = Grid("int8", 256, 128.0)
UINT2 = Grid("uint2", 4, None)
UINT3 = Grid("uint3", 8, None)
UINT4 = Grid("uint4", 16, None)
UINT8 = Grid("uint8", 256, None)

GRIDS = {
    grid.name: grid
    for grid in (
        *(BINARY, TERNARY, SEQ2, INT2, INT3, INT4, INT5, INT6, INT8),
        *(UINT2, UINT3, UINT4, UINT8),
    )
}


@dataclass(frozen=True)
class SuperBlock:
    """Scales that share one: in every `size` inputs, `scale = d * factor`, a factor for a group.

    `factor` is a whole number from 1 to `most`; `d` has `digits` significant bits, so that the
    product has at most eight and is portable (see `qexport.tensor.portable`). What a K-quant of
    GGUF can hold, in other words.
    """

    name: str
    grid: Grid
    size: int
    group_size: int
    most: int
    digits: int


SUPER_BLOCKS = {
    block.name: block
    for block in (
        SuperBlock("Q2_K", SEQ2, 256, 16, 15, 4),
        SuperBlock("Q3_K", INT3, 256, 16, 31, 3),
    )
}


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")


_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Scheme:
    """How one weight matrix [out, in] is quantized.

    `group_size` consecutive inputs share a scale; None is one scale per output channel.
    `scale_dtype` is the dtype that scales are stored in; float16 scales made by this project are
    also exact in bfloat16 (see `qexport.tensor.portable`). With a `super_block`, they share one.
    """

    grid: Grid
    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float16
    super_block: SuperBlock | None = None

    @property
    def symmetric(self) -> bool:
        return self.grid.zero is not None

    def groups(self, in_features: int) -> int:
        """Groups per output channel. Raises ValueError where the group does not divide it."""
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            raise ValueError(f"group size {self.group_size} does not divide {in_features}")
        if self.super_block is not None and in_features % self.super_block.size:
            raise ValueError(f"super-blocks of {self.super_block.size} do not fit {in_features}")
        return in_features // self.group_size

    def bits_per_weight(self, in_features: int) -> float:
        """Bits per weight with codes packed densely and scales (and zero points) counted in."""
        per_group = self.scale_dtype.itemsize * 8 + (0 if self.symmetric else self.grid.bits)
        return self.grid.bits + per_group * self.groups(in_features) / in_features

    def to_json(self) -> dict[str, Any]:
        """The scheme as it stands in config.json; grid constants are spelled out for readers."""
        shared = {} if self.super_block is None else {"super_block": self.super_block.name}
        return {
            "grid": self.grid.name,
            "bits": self.grid.bits,
            "levels": self.grid.levels,
            "zero_point": self.grid.zero,
            "group_size": self.group_size,
            "scale_dtype": dtype_name(self.scale_dtype),
            **shared,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Scheme":
        """Read `to_json`'s form. Raises CheckpointError on anything else."""
        grid = GRIDS.get(str(value.get("grid")))
        dtype = _DTYPES.get(str(value.get("scale_dtype")))
        group = value.get("group_size")
        name = value.get("super_block")
        shared = SUPER_BLOCKS.get(str(name))
        if (shared is None) != (name is None) or (
            shared is not None and (shared.grid, shared.group_size) != (grid, group)
        ):
            grid = None
        spelled = {"bits", "levels", "zero_point"} & set(value)
        scheme = cls(grid, group, dtype, shared) if grid and dtype and _valid_group(group) else None
        if scheme is None or any(value[key] != scheme.to_json()[key] for key in spelled):
            raise CheckpointError(
                f"the quantization scheme {value} is not one this version knows; "
                "upgrade qexport or pack the run again"
            )
        return scheme

    @property
    def label(self) -> str:
        """Grid and groups: `seq2 g64`."""
        group = "per channel" if self.group_size is None else f"g{self.group_size}"
        shared = "" if self.super_block is None else f" {self.super_block.name}"
        return f"{self.grid.name} {group}{shared}"

    def __str__(self) -> str:
        return f"{self.label}, {dtype_name(self.scale_dtype)} scales"


def _valid_group(group: object) -> bool:
    return group is None or (type(group) is int and group > 0)
