"""`qexport::cuda_matmul`: one product with packed weights, by the kernel that suits its size."""

from ctypes import c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from qexport.runtime.kernels.cuda_launch import (
    DenseProblem,
    MatmulProblem,
    architecture,
    launch,
)
from qexport.runtime.kernels.cuda_source import (
    DENSE_CHUNKS,
    DENSE_SHARED,
    Tile,
    WeightKind,
    dense_instance,
    matmul_instance,
    text_of,
)
from qexport.runtime.kernels.cuda_tiles import dense_from, splits, tile_for

__all__ = ["COUNTERS", "dequantize", "matmul", "matmul_by"]

COUNTERS = 1024  # blocks that may share their inputs' parts with others
_DENSE_BYTES = 32 << 20  # of dense weights at a time: they stay in the L2 cache
_EIGHT = 8  # numbers in 16 bytes: rows begin and end on such


@torch.library.custom_op("qexport::cuda_matmul", mutates_args=())
def matmul(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    arrived: Tensor,
    out_features: int,
    bits: int,
    twice_zero: int,
    span: int,
) -> Tensor:
    """`x @ weight.T + bias` for x [tokens, in] in float16 or bfloat16.

    words    int32 of `pack_codes`
    scales   of `pack_scales`, zeros likewise or None; bias float32 [out] or None
    arrived  int32 [COUNTERS], zeros before and after; a layer's own, so that one stream uses it
    span     `span_inputs`, 0 where a row has one scale
    """
    kind = WeightKind(bits, twice_zero, zeros is not None, span, scales.dtype)
    tokens = len(x)
    if tokens == 0:
        return x.new_empty(0, out_features)
    machine = architecture(x.device)
    if tokens >= dense_from(machine):
        return _by_cublas(x, words, scales, zeros, bias, out_features, kind)
    tile = tile_for(machine, kind, tokens)
    return matmul_by(tile, x, words, scales, zeros, bias, arrived, out_features, kind)


@matmul.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    arrived: Tensor,
    out_features: int,
    *_: object,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def matmul_by(
    tile: Tile,
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    arrived: Tensor,
    out_features: int,
    kind: WeightKind,
) -> Tensor:
    """The same by a kernel of a given tile."""
    x = _aligned(x)
    tokens, inputs = x.shape
    out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    tiles, chunks = words.shape[:2]
    blocks = (-(-out_features // tile.outputs), -(-tokens // tile.tokens))
    parts = splits(tile, tokens, out_features, chunks, _processors(x.device))
    if blocks[0] * blocks[1] > COUNTERS:
        parts = 1
    partial = torch.empty(
        (parts, tokens, out_features) if parts > 1 else 0, dtype=torch.float32, device=x.device
    )
    problem = MatmulProblem(
        *(_address(tensor) for tensor in (x, words, scales, zeros, bias, out, partial, arrived)),
        *(tokens, out_features, inputs, x.stride(0), tiles, chunks),
    )
    text = _matmul_text(kind, tile, x.dtype)
    launch(text, problem, (*blocks, parts), tile.threads, tile.shared, x.device)
    return out


def dequantize(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: WeightKind,
    rows: tuple[int, int],
    inputs: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of the dense weight [out, inputs], the first a multiple of 16, inputs of 8."""
    first, end = rows
    out = torch.empty(end - first, inputs, dtype=dtype, device=words.device)
    chunks = words.shape[1]
    problem = DenseProblem(
        *(_address(tensor) for tensor in (words, scales, zeros, out)),
        *(end - first, inputs, chunks, first // 16),
    )
    grid = (-(-chunks // DENSE_CHUNKS), -(-(end - first) // 16), 1)
    text = _dense_text(kind, dtype)
    launch(text, problem, grid, 32 * DENSE_CHUNKS, DENSE_SHARED, words.device)
    return out


def _by_cublas(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    kind: WeightKind,
) -> Tensor:
    x = _aligned(x)
    inputs = x.shape[1]
    step = max(16, _DENSE_BYTES // (2 * inputs) // 256 * 256)
    parts = []
    for first in range(0, out_features, step):
        end = min(first + step, out_features)
        dense = dequantize(words, scales, zeros, kind, (first, end), inputs, x.dtype)
        offset = None if bias is None else bias[first:end].to(x.dtype)
        parts.append(linear(x, dense, offset))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _aligned(x: Tensor) -> Tensor:
    """Rows that begin at multiples of 16 bytes and are whole ones."""
    if x.shape[1] % _EIGHT:
        return pad(x, (0, -x.shape[1] % _EIGHT))
    if x.stride(1) != 1 or x.stride(0) % _EIGHT or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _address(tensor: Tensor | None) -> c_void_p | None:
    return None if tensor is None else c_void_p(tensor.data_ptr())


@cache
def _matmul_text(kind: WeightKind, tile: Tile, dtype: torch.dtype) -> str:
    return text_of("matmul.cuh", "qx::Problem", matmul_instance(kind, tile, dtype), tile.threads)


@cache
def _dense_text(kind: WeightKind, dtype: torch.dtype) -> str:
    return text_of("dequantize.cuh", "qx::Dense", dense_instance(kind, dtype), 32 * DENSE_CHUNKS)


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
