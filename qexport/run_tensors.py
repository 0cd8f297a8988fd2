"""The tensors of a RUN: latent weights and scales, or codes, scales, zero points and minima."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qexport.checkpoint import (
    Entry,
    check_codes,
    check_zeros,
    checked_minima,
    checked_scales,
    dense_entry,
    expect,
    modules_from_json,
)
from qexport.errors import CheckpointError
from qexport.grid import Scheme
from qexport.paretoq import TRAINED_GRIDS
from qexport.shards import Parts, ShardReader
from qexport.tensor import QuantizedTensor, quantize

__all__ = ["code_entries", "code_parts", "code_tensors", "latent_entries"]

_SCALE = ".weight_scale"
_ZERO = ".weight_zero_point"
_MINIMUM = ".weight_minimum"


def latent_entries(reader: ShardReader, quantization: dict[str, Any]) -> dict[str, Entry]:
    """Of a RUN that was trained. Raises CheckpointError where the files are not of its config."""
    modules = modules_from_json(quantization)
    scales = {module + _SCALE for module in modules}
    entries = {name: dense_entry(reader, name) for name in reader if name not in scales}
    for module, (scheme, shape) in modules.items():
        if scheme.grid not in TRAINED_GRIDS:
            raise CheckpointError(
                f"{reader.folder}: {module} is on the grid {scheme.grid.name}, which is not "
                "trained; its config.json is damaged."
            )
        scales_shape = (shape[0], scheme.groups(shape[1]))
        expect(reader, f"{module}.weight", torch.float32, shape)
        expect(reader, module + _SCALE, scheme.scale_dtype, scales_shape)
        load = partial(_load_latent, reader, module, scheme)
        size = 4 * shape[0] * shape[1] + scheme.scale_dtype.itemsize * math.prod(scales_shape)
        entries[f"{module}.weight"] = Entry(shape, torch.float32, load, scheme, size)
    return entries


def _load_latent(reader: ShardReader, module: str, scheme: Scheme) -> QuantizedTensor:
    weight = reader.tensor(f"{module}.weight")
    scale = checked_scales(reader, module + _SCALE).float()
    if not bool((scale > 0).all()):
        raise CheckpointError(
            f"{reader.folder}: {module} holds a negative scale; its training diverged."
        )
    if not bool(weight.isfinite().all()):
        raise CheckpointError(
            f"{reader.folder}: {module} holds a NaN or an infinity; its training diverged."
        )
    return quantize(weight, scale, scheme)


def code_entries(reader: ShardReader, quantization: dict[str, Any]) -> dict[str, Entry]:
    """Of a RUN that was quantized without training. Raises CheckpointError likewise."""
    modules = modules_from_json(quantization)
    suffixes = (_SCALE, _ZERO, _MINIMUM)
    theirs = {module + suffix for module in modules for suffix in suffixes}
    entries = {name: dense_entry(reader, name) for name in reader if name not in theirs}
    for module, (scheme, shape) in modules.items():
        size = 0
        for name, (dtype, part) in code_parts(module, scheme, shape).items():
            expect(reader, name, dtype, part)
            size += dtype.itemsize * math.prod(part)
        load = partial(_load_codes, reader, module, scheme)
        entries[f"{module}.weight"] = Entry(shape, scheme.scale_dtype, load, scheme, size)
    return entries


def code_parts(module: str, scheme: Scheme, shape: tuple[int, int]) -> Parts:
    """Dtypes and shapes of what a RUN of codes holds of a module."""
    groups = (shape[0], scheme.groups(shape[1]))
    parts: Parts = {
        f"{module}.weight": (torch.uint8, shape),
        module + _SCALE: (scheme.scale_dtype, groups),
    }
    if scheme.grid.zeros:
        parts[module + _ZERO] = torch.uint8, groups
    if scheme.grid.minima:
        parts[module + _MINIMUM] = torch.float32, groups
    return parts


def code_tensors(module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """What `code_parts` promises."""
    found = {f"{module}.weight": tensor.codes, module + _SCALE: tensor.scales}
    if tensor.zeros is not None:
        found[module + _ZERO] = tensor.zeros
    if tensor.minima is not None:
        found[module + _MINIMUM] = tensor.minima
    return found


def _load_codes(reader: ShardReader, module: str, scheme: Scheme) -> QuantizedTensor:
    codes = reader.tensor(f"{module}.weight")
    check_codes(codes, scheme.grid, f"{reader.folder}: {module}")
    zeros = reader.tensor(module + _ZERO) if scheme.grid.zeros else None
    if zeros is not None:
        check_zeros(zeros, scheme.grid, f"{reader.folder}: {module}")
    minima = checked_minima(reader, module + _MINIMUM) if scheme.grid.minima else None
    scales = checked_scales(reader, module + _SCALE)
    return QuantizedTensor(codes, scales, scheme, zeros, minima)
