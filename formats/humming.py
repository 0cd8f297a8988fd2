"""The native layout of humming, the one that stock vLLM serves with half-integer zero points.

For a layer with K inputs, N outputs, groups of g and b bits:

    weight        int32 [N, K*b/32]       codes as one dense bitstream along K
    weight_scale  [N, K/g] or [N, 1]
    zero_point    [N, K/g] or [N, 1]      in the dtype of the scales; only where it is not 2**(b-1)

A weight is (code - zero) * scale. Engines cast scales and zero points to the model's dtype, which
keeps them: portable scales, and zero points up to 256 in halves below 64, are exact in both 16-bit
dtypes.
"""

from typing import Any

import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint, Modules, checked_scales
from qexport.errors import CheckpointError
from qexport.formats.folder import FolderFormat, dense_linears, group_size_of, single_scheme
from qexport.formats.words import WORD, from_words, in_words, scale_dtype_of, words
from qexport.grid import BINARY, GRIDS, SEQ2, UINT2, UINT3, UINT4, UINT8, Grid, Scheme

from qexport.grid import INT2, INT3, INT4, INT5, INT6, INT8  # isort: skip
from qexport.shards import Parts, ShardReader
from qexport.tensor import QuantizedTensor

__all__ = ["Humming"]

_SYMMETRIC = {grid.bits: grid for grid in (INT2, INT3, INT4, INT5, INT6, INT8)}
_HALVES = {BINARY.bits: BINARY, SEQ2.bits: SEQ2}
_ASYMMETRIC = {grid.bits: grid for grid in (UINT2, UINT3, UINT4, UINT8)}
_SMALLEST_GROUP = 16


class Humming(FolderFormat):
    """`b_dtype: uintB`, with zero points as numbers where they are not the middle."""

    name = "humming"
    grids = tuple(
        sorted(
            (*_HALVES.values(), *_SYMMETRIC.values(), *_ASYMMETRIC.values()),
            key=lambda grid: grid.bits,
        )
    )
    scale_dtypes = (torch.float16, torch.bfloat16)

    def describes(self, quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") == "humming"

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if shape[1] % WORD:
            return f"humming packs whole words of 32, and a layer has {shape[1]} inputs"
        if scheme.group_size is not None and scheme.group_size < _SMALLEST_GROUP:
            return f"humming has groups of 16 and more, and this is g{scheme.group_size}"
        return None

    def parts(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Parts:
        out, inputs = shape
        scales = (scheme.scale_dtype, (out, scheme.groups(inputs)))
        parts: Parts = {
            f"{module}.weight": (torch.int32, (out, words(inputs, scheme.grid.bits))),
            f"{module}.weight_scale": scales,
        }
        if _has_zero_point(scheme.grid):
            parts[f"{module}.zero_point"] = scales
        return parts

    def encode_parts(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        grid = tensor.scheme.grid
        parts = {
            f"{module}.weight": in_words(tensor.codes, grid.bits),
            f"{module}.weight_scale": tensor.scales,
        }
        if _has_zero_point(grid):
            zeros = tensor.scales.new_full(tensor.scales.shape, grid.middle)
            if tensor.zeros is not None:
                zeros = tensor.zeros.to(tensor.scales.dtype)
            parts[f"{module}.zero_point"] = zeros
        return parts

    def quantization_config(self, modules: Modules, source: Checkpoint) -> dict[str, Any]:
        scheme = single_scheme(self, modules)
        return {
            "quant_method": "humming",
            # not `dtype` and `group_size`: the engine takes these for the activations' too
            "b_dtype": f"uint{scheme.grid.bits}",
            "weight_scale_group_size": scheme.group_size or 0,
            "has_zero_point": _has_zero_point(scheme.grid),
            "is_fp_zero_point": _has_zero_point(scheme.grid),
            "ignore": dense_linears(source),
        }

    def modules(self, reader: ShardReader, quantization: dict[str, Any]) -> Modules:
        found = str(quantization.get("b_dtype", "")).removeprefix("uint")
        width = int(found) if found in {str(grid.bits) for grid in GRIDS.values()} else 0
        has_zero = bool(quantization.get("has_zero_point"))
        if not width or "dynamic" in quantization:
            raise CheckpointError(
                f"{reader.folder}: a humming checkpoint of b_dtype "
                f"{quantization.get('b_dtype')!r}; uint1 to uint8, one for all layers, are read."
            )
        if has_zero and not quantization.get("is_fp_zero_point"):
            raise CheckpointError(f"{reader.folder}: packed zero points of humming are not read.")
        modules: Modules = {}
        for name in reader:
            weight = name.removesuffix("_scale")
            if not name.endswith(".weight_scale") or weight not in reader:
                continue
            if reader.dtype(weight) == torch.int32:
                module = weight.removesuffix(".weight")
                stated = quantization.get("weight_scale_group_size", 0)
                modules[module] = _scheme(reader, module, width, has_zero, stated)
        return modules

    def decode(
        self, reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        codes = from_words(reader.tensor(f"{module}.weight"), scheme.grid.bits, shape[1])
        scales = checked_scales(reader, f"{module}.weight_scale")
        zeros = None
        if _has_zero_point(scheme.grid):
            stored = reader.tensor(f"{module}.zero_point").float()
            if not scheme.grid.zeros and bool((stored != scheme.grid.middle).any()):
                raise CheckpointError(f"{reader.folder}: {module} mixes zero points.")
            zeros = stored.to(torch.uint8) if scheme.grid.zeros else None
        return QuantizedTensor(codes, scales, scheme, zeros)


def _has_zero_point(grid: Grid) -> bool:
    return grid.zero is None or grid.zero * 2 != grid.levels


def _scheme(
    reader: ShardReader, module: str, width: int, has_zero: bool, stated: object
) -> tuple[Scheme, tuple[int, int]]:
    out, row = (*reader.shape(f"{module}.weight"), 0, 0)[:2]
    groups = (*reader.shape(f"{module}.weight_scale"), 0, 0)[1]
    inputs = row * WORD // width
    if not out or not inputs or not groups or inputs % groups:
        raise CheckpointError(f"{reader.folder}: {module} is no humming layer of {width} bits.")
    dtype = scale_dtype_of(reader, f"{module}.weight_scale")
    group_size = group_size_of(reader, module, inputs, groups, stated)
    grid = _zero_point_grid(reader, module, width) if has_zero else _SYMMETRIC.get(width)
    if grid is None:
        raise CheckpointError(f"{reader.folder}: {module}: {width} bits of humming are not read.")
    return Scheme(grid, group_size, dtype), (out, inputs)


def _zero_point_grid(reader: ShardReader, module: str, width: int) -> Grid | None:
    """The half-integer grid where all zero points are its own, else the one with whole ones."""
    zeros = reader.tensor(f"{module}.zero_point").float()
    half = _HALVES.get(width)
    if half is not None and bool((zeros == half.middle).all()):
        return half
    whole = _ASYMMETRIC.get(width)
    in_range = (zeros >= 0) & (zeros < 2**width) & (zeros == zeros.floor())
    if whole is None or not bool(in_range.all()):
        raise CheckpointError(
            f"{reader.folder}: {module} has zero points that are neither {width}-bit codes nor "
            "those of a grid known here."
        )
    return whole
