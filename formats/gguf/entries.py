"""Tensors of a GGUF file as entries of a checkpoint, whoever wrote them.

Types of one step and a constant zero point are read as quantized matrices, the others as the dense
ones that they decode to. For its own files qexport writes down schemes, which say more: a group
larger than a block, a zero point, a half-integer grid. They are checked against the blocks.
"""

import json
import math
from functools import partial

import torch
from torch import Tensor

from qexport.checkpoint import Entry, Modules, modules_from_json
from qexport.errors import CheckpointError
from qexport.formats.base import EMBEDDINGS
from qexport.formats.gguf.block import Block, Decoded
from qexport.formats.gguf.blocks import BY_ID
from qexport.formats.gguf.container import GgufFile, TensorInfo
from qexport.formats.gguf.names import Rows, to_gguf
from qexport.grid import Grid, Scheme
from qexport.tensor import QuantizedTensor

__all__ = ["DENSE_IDS", "ROWS", "SCHEMES", "entry_of", "schemes_of"]

SCHEMES = "qexport.config_groups"
ROWS = 1 << 22  # weights that are encoded or decoded at a time
_DENSE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
DENSE_IDS = {dtype: number for number, dtype in _DENSE.items()}


def schemes_of(file: GgufFile) -> Modules:
    """What qexport wrote down of its own modules; nothing in files of others."""
    if SCHEMES not in file:
        return {}
    try:
        value = json.loads(file.text(SCHEMES))
    except (ValueError, RecursionError) as error:
        raise file.damaged(f"{SCHEMES} is not JSON") from error
    if not isinstance(value, dict):
        raise file.damaged(f"{SCHEMES} is not an object")
    return modules_from_json(value)


def entry_of(
    file: GgufFile,
    name: str,
    info: TensorInfo,
    rows: Rows,
    known: tuple[Scheme, tuple[int, int]] | None,
) -> Entry:
    """One tensor, not read yet: quantized if its type says so, or if we wrote down how."""
    dtype = _DENSE.get(info.type)
    if dtype is not None:
        size = math.prod(info.shape) * dtype.itemsize
        load = partial(_load_dense, file, name, info.shape, dtype, rows, size)
        return Entry(info.shape, dtype, load, None, size)
    block = BY_ID.get(info.type)
    if block is None:
        raise CheckpointError(f"{file.path}: {name[:80]} has type {info.type}, which is not read.")
    if len(info.shape) != 2 or info.shape[1] % block.size:
        raise file.damaged(f"{name} is {block.name} of shape {list(info.shape)}")
    shape = (info.shape[0], info.shape[1])
    size = shape[0] * shape[1] // block.size * block.bytes
    scheme = known[0] if known is not None else _natural(block)
    if known is not None and known[1] != shape:
        raise file.damaged(f"{name} is {list(shape)} and {SCHEMES} says {list(known[1])}")
    if name in EMBEDDINGS and known is None:
        scheme = None  # rounded dense matrices, which a model looks rows up in
    if scheme is None:
        load_dense = partial(_load_rounded, file, name, block, shape, rows)
        return Entry(shape, torch.float32, load_dense, None, size, block.name)
    load_blocks = partial(_load_blocks, file, name, block, shape, rows, scheme)
    return Entry(shape, scheme.scale_dtype, load_blocks, scheme, size, block.name)


def _natural(block: Block) -> Scheme | None:
    """The scheme of a type in files of others; steps of sub-blocks are products, in float32."""
    if block.natural is None:
        return None
    dtype = torch.float16 if block.sub == block.size else torch.float32
    return Scheme(block.natural, block.sub, dtype)


def _load_dense(
    file: GgufFile, name: str, shape: tuple[int, ...], dtype: torch.dtype, rows: Rows, size: int
) -> Tensor:
    data = torch.from_numpy(file.data(to_gguf(name) or name, size))
    tensor = rows.from_file(name, data.view(dtype).view(shape))
    assert isinstance(tensor, Tensor)
    return tensor


def _decoded(file: GgufFile, name: str, block: Block, shape: tuple[int, int]) -> "list[Decoded]":
    """A tensor's blocks, decoded some rows at a time."""
    out, inputs = shape
    blocks = inputs // block.size
    data = file.data(to_gguf(name) or name, out * blocks * block.bytes)
    step = max(1, ROWS // inputs)
    parts = []
    for first in range(0, out, step):
        last = min(first + step, out)
        chunk = data[first * blocks * block.bytes : last * blocks * block.bytes]
        raw = torch.from_numpy(chunk).view(last - first, blocks, block.bytes)
        decoded = block.decode(raw)
        minimum = decoded.step if decoded.minimum is None else decoded.minimum
        if not bool((decoded.step.isfinite() & minimum.isfinite()).all()):
            raise file.damaged(f"{name} has a scale that is not finite")
        parts.append(decoded)
    return parts


def _load_rounded(
    file: GgufFile, name: str, block: Block, shape: tuple[int, int], rows: Rows
) -> Tensor:
    parts = [decoded.weights() for decoded in _decoded(file, name, block, shape)]
    tensor = rows.from_file(name, torch.cat(parts))
    assert isinstance(tensor, Tensor)
    return tensor


def _load_blocks(
    file: GgufFile,
    name: str,
    block: Block,
    shape: tuple[int, int],
    rows: Rows,
    scheme: Scheme,
) -> QuantizedTensor:
    parts = [
        _as_quantized(decoded, scheme, file, name) for decoded in _decoded(file, name, block, shape)
    ]
    tensor = rows.from_file(name, QuantizedTensor.of_rows(parts))
    assert isinstance(tensor, QuantizedTensor)
    return tensor


def _as_quantized(decoded: Decoded, scheme: Scheme, file: GgufFile, name: str) -> QuantizedTensor:
    """Blocks as codes on a grid. Raises CheckpointError where they do not say what it says."""
    out, inputs = decoded.codes.shape
    groups = scheme.groups(inputs)
    sub = inputs // decoded.step.shape[1]
    if decoded.values != scheme.grid.values or (inputs // groups) % sub:
        raise file.damaged(f"{name} is not on the grid {scheme} that its metadata names")
    steps = decoded.step.view(out, groups, -1)
    scales = steps[..., 0].to(scheme.scale_dtype)
    zeros = _zeros(decoded, groups, scheme.grid)
    top = int(decoded.codes.max())
    same = bool((steps == scales.float().unsqueeze(-1)).all())
    minima = None
    if scheme.grid.minima and decoded.minimum is not None:
        whole = decoded.minimum.view(out, groups, -1)
        minima = whole[..., 0].contiguous()
        same = same and bool((whole == minima.unsqueeze(-1)).all())
    elif decoded.minimum is not None:
        middle = torch.tensor(scheme.grid.middle) if zeros is None else zeros.float().unsqueeze(-1)
        same = same and bool((decoded.minimum.view(steps.shape) == steps * middle).all())
    elif not scheme.grid.zeros:
        same = same and decoded.zero == scheme.grid.zero and not scheme.grid.minima
    if not same or top >= scheme.grid.levels:
        raise file.damaged(f"{name} is not on the grid {scheme} that its metadata names")
    return QuantizedTensor(decoded.codes, scales, scheme, zeros, minima)


def _zeros(decoded: Decoded, groups: int, grid: Grid) -> Tensor | None:
    """Zero points [out, groups] of an asymmetric grid, from minima or the type's own."""
    if not grid.zeros:
        return None
    out = decoded.codes.shape[0]
    if decoded.minimum is None:
        assert decoded.zero is not None
        return torch.full((out, groups), int(decoded.zero), dtype=torch.uint8)
    ratio = (decoded.minimum / decoded.step).view(out, groups, -1)[..., 0]
    return ratio.nan_to_num(0, 0, 0).round().clamp(0, grid.levels - 1).to(torch.uint8)
