"""What a code means (`Grid`) and how a weight matrix is quantized (`Scheme`)."""

from dataclasses import dataclass
from typing import Any

import torch

from qexport.errors import CheckpointError

__all__ = [
    "ASYMMETRIC",
    "BINARY",
    "GRIDS",
    "INT2",
    "INT3",
    "INT4",
    "INT5",
    "INT6",
    "INT8",
    "IQ4_NL",
    "KQ2",
    "KQ4",
    "KQ5",
    "K_QUANTS",
    "NF4",
    "SEQ2",
    "SUPER_BLOCKS",
    "SYMMETRIC",
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
    """What code `c` in `0 .. levels-1` means, unitless. Most grids are uniform: `c - zero`.

    zero     may be half-integer: ParetoQ's SEQ grid is 0..3 about 1.5. None where it is not the
             same for all groups
    values   of a codebook, ascending: code `c` means `values[c]`
    minima   whether groups have a float32 minimum, in place of a whole zero point: `c * scale -
             minimum`, as in GGUF's K-quants
    """

    name: str
    levels: int
    zero: float | None
    values: tuple[float, ...] | None = None
    minima: bool = False

    @property
    def bits(self) -> int:
        """Bits that one code takes in a dense stream."""
        return (self.levels - 1).bit_length()

    @property
    def zeros(self) -> bool:
        """Whether every group has a zero point of its own (asymmetric quantization)."""
        return self.zero is None and self.uniform

    @property
    def uniform(self) -> bool:
        """Whether all that a group has is a scale and a whole or half zero point."""
        return self.values is None and not self.minima

    def factor_into(self, wider: "Grid") -> int | None:
        """1 or 2 if every value here is one of `wider` at the scale divided by it, else None.

        The portable scales of this project keep their halves exact, so that half-integer grids
        go into integer ones at half the step. Zero points per group go into a symmetric grid as
        `code - zero`; a symmetric grid goes into an asymmetric one about its middle. Grids that are
        not uniform go into themselves alone.
        """
        if not (self.uniform and wider.uniform):
            return 1 if self == wider else None
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
# of a width, what engines call symmetric and what they do not: zero points are whole numbers
SYMMETRIC = {2: INT2, 3: INT3, 4: INT4, 8: INT8}
ASYMMETRIC = {2: UINT2, 3: UINT3, 4: UINT4, 8: UINT8}
# with minima: of the K-quants
KQ2 = Grid("kq2", 4, None, minima=True)
KQ4 = Grid("kq4", 16, None, minima=True)
KQ5 = Grid("kq5", 32, None, minima=True)
# quantiles of the normal distribution, 0 among them (Dettmers et al. 2023, appendix E)
NF4 = Grid(
    "nf4",
    16,
    None,
    values=(
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)
# llama.cpp's IQ4_NL (ggml-common.h): whole numbers, denser about zero
IQ4_NL = Grid(
    "iq4_nl",
    16,
    None,
    values=(
        *(-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0),
        *(1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0),
    ),
)

GRIDS = {
    grid.name: grid
    for grid in (
        *(BINARY, TERNARY, SEQ2, INT2, INT3, INT4, INT5, INT6, INT8),
        *(UINT2, UINT3, UINT4, UINT8, KQ2, KQ4, KQ5, NF4, IQ4_NL),
    )
}


@dataclass(frozen=True)
class SuperBlock:
    """Scales that share one: in every `size` inputs, `scale = d * factor`, a factor for a group.

    A factor is a whole number from `least` to `most`, and minima are likewise `dmin * factor`, from
    0 to `most`. In float32, `d` is a float16; in float16, it has so few significant bits that the
    product has at most eight and is portable (see `qexport.tensor.portable`), for grids without
    minima. What a K-quant of GGUF can hold, in other words.
    """

    name: str
    grid: Grid
    size: int
    group_size: int
    most: int
    least: int = 1

    @property
    def bits_per_weight(self) -> float:
        """Of a GGUF block: codes, factors, and two float16, or one where there are no minima."""
        groups, ways = self.size // self.group_size, 2 if self.grid.minima else 1
        factors = groups * ways * max(self.most, -self.least).bit_length()
        return self.grid.bits + (factors + 16 * ways) / self.size


_Q3_K = SuperBlock("Q3_K", INT3, 256, 16, 31, -32)
# whose scales can be portable: of grids that are trained
SUPER_BLOCKS = {"Q2_K": SuperBlock("Q2_K", SEQ2, 256, 16, 15), "Q3_K": _Q3_K}
# all that they can hold, in float32: see `qexport.quantization.kquant`
K_QUANTS = {
    "Q2_K": SuperBlock("Q2_K", KQ2, 256, 16, 15),
    "Q3_K": _Q3_K,
    "Q4_K": SuperBlock("Q4_K", KQ4, 256, 32, 63),
    "Q5_K": SuperBlock("Q5_K", KQ5, 256, 32, 63),
    "Q6_K": SuperBlock("Q6_K", INT6, 256, 16, 127, -128),
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
    With `double_quant`, they are of 8 bits: see `qexport.double_quant`.
    """

    grid: Grid
    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float16
    super_block: SuperBlock | None = None
    double_quant: bool = False

    def groups(self, in_features: int) -> int:
        """Groups per output channel. Raises ValueError where the group does not divide it."""
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            raise ValueError(
                f"group size {self.group_size} does not divide the {in_features} inputs"
            )
        size = self.super_block.size if self.super_block is not None else 1
        if in_features % size:
            raise ValueError(f"super-blocks of {size} do not fit the {in_features} inputs")
        return in_features // self.group_size

    def bits_per_weight(self, in_features: int) -> float:
        """Bits per weight with codes packed densely and scales (and zero points) counted in.

        Scales that share one in float32 count as in GGUF.
        """
        if self.super_block is not None and self.scale_dtype == torch.float32:
            return self.super_block.bits_per_weight
        scale = 8 + 32 / 256 if self.double_quant else self.scale_dtype.itemsize * 8
        per_group = scale + (self.grid.bits if self.grid.zeros else 0)
        return self.grid.bits + per_group * self.groups(in_features) / in_features

    def to_json(self) -> dict[str, Any]:
        """The scheme as it stands in config.json; grid constants are spelled out for readers."""
        grid, more = self.grid, dict[str, Any]()
        if grid.values is not None:
            more["values"] = list(grid.values)
        if grid.minima:
            more["minima"] = True
        if self.super_block is not None:
            more["super_block"] = self.super_block.name
        if self.double_quant:
            more["double_quant"] = True
        return {
            "grid": grid.name,
            "bits": grid.bits,
            "levels": grid.levels,
            "zero_point": grid.zero,
            "group_size": self.group_size,
            "scale_dtype": dtype_name(self.scale_dtype),
            **more,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Scheme":
        """Read `to_json`'s form. Raises CheckpointError on anything else."""
        grid = GRIDS.get(str(value.get("grid")))
        dtype = _DTYPES.get(str(value.get("scale_dtype")))
        group = value.get("group_size")
        name, double = value.get("super_block"), value.get("double_quant", False)
        blocks = (*SUPER_BLOCKS.values(), *K_QUANTS.values())
        shared = next((b for b in blocks if (b.name, b.grid) == (name, grid)), None)
        known = name is None or (shared is not None and shared.group_size == group)
        if double is True:  # of codebooks, in float32
            known = known and dtype == torch.float32 and grid is not None and bool(grid.values)
        scheme = None
        if grid and dtype and known and _valid_group(group) and type(double) is bool:
            scheme = cls(grid, group, dtype, shared, double)
        spelled = {"bits", "levels", "zero_point", "values", "minima"} & set(value)
        if scheme is None or any(value[key] != scheme.to_json().get(key) for key in spelled):
            said = {key: part for key, part in value.items() if key != "modules"}
            raise CheckpointError(
                f"the quantization scheme {str(said)[:300]} is not one this version knows; "
                "upgrade qexport or pack the run again"
            )
        return scheme

    @property
    def label(self) -> str:
        """Grid and groups: `seq2 g64`."""
        group = "per channel" if self.group_size is None else f"g{self.group_size}"
        shared = "" if self.super_block is None else f" {self.super_block.name}"
        return f"{self.grid.name} {group}{shared}{' double' if self.double_quant else ''}"

    def __str__(self) -> str:
        return f"{self.label}, {dtype_name(self.scale_dtype)} scales"


def _valid_group(group: object) -> bool:
    return group is None or (type(group) is int and group > 0)
