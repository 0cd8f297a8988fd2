"""`qexport::cuda_matmul`: one product with packed weights, by the kernel that suits its size."""

from ctypes import c_void_p
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from qexport.runtime.kernels.cuda_launch import (
    DenseProblem,
    MatmulProblem,
    architecture,
    launch,
)
from qexport.runtime.kernels.cuda_layout import chunk_inputs, pack_codes, pack_scales
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
from qexport.tensor import QuantizedTensor

__all__ = [
    "COUNTERS",
    "PackedWeight",
    "dense_matmul",
    "dequantize",
    "matmul",
    "matmul_text",
    "tile_matmul",
]

COUNTERS = 1024  # blocks that may share their inputs' parts with others
_DENSE_BYTES = 32 << 20  # of dense weights at a time: they stay in the L2 cache
_EIGHT = 8  # numbers in 16 bytes: rows begin and end on such


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the order of CUDA kernels.

    words    int32 of `pack_codes`
    scales   of `pack_scales`, zeros likewise or None; bias float32 [out] or None
    arrived  int32 [COUNTERS], zeros before and after a call; so that one stream uses a weight
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    arrived: Tensor
    out_features: int
    kind: WeightKind

    @property
    def inputs(self) -> int:
        """Inputs, whole chunks of them."""
        return self.words.shape[1] * chunk_inputs(self.kind.bits)

    @classmethod
    def of(cls, weight: QuantizedTensor, bias: Tensor | None) -> "PackedWeight":
        (out, inputs), group = weight.shape, weight.scheme.group_size
        kind = WeightKind.of(weight.scheme)
        zeros = weight.zeros
        if zeros is not None:
            zeros = pack_scales(zeros.to(weight.scales.dtype), inputs, group, kind.bits)
        return cls(
            pack_codes(weight.codes, kind.bits),
            pack_scales(weight.scales, inputs, group, kind.bits),
            zeros,
            None if bias is None else bias.float().contiguous(),
            torch.zeros(COUNTERS, dtype=torch.int32, device=weight.codes.device),
            out,
            kind,
        )


@torch.library.custom_op("qexport::cuda_matmul", mutates_args=())
def _operator(
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
    # `arrived` is written, and zero again at the end: for torch it does not change
    kind = WeightKind(bits, twice_zero, zeros is not None, span, scales.dtype)
    weight = PackedWeight(words, scales, zeros, bias, arrived, out_features, kind)
    if len(x) == 0:
        return x.new_empty(0, out_features)
    machine = architecture(x.device)
    if len(x) >= dense_from(machine):
        return dense_matmul(x, weight)
    return tile_matmul(x, weight, tile_for(machine, kind, len(x)))


@_operator.register_fake
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


def matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """`x @ weight.T + bias` for x [tokens, in] in float16 or bfloat16, as one operator of torch."""
    w, kind = weight, weight.kind
    made: Tensor = _operator(
        *(x, w.words, w.scales, w.zeros, w.bias, w.arrived, w.out_features),
        *(kind.bits, kind.twice_zero, kind.span),
    )
    return made


def tile_matmul(x: Tensor, weight: PackedWeight, tile: Tile) -> Tensor:
    """The same by a kernel of a given tile."""
    x = _aligned(x)
    tokens, inputs = x.shape
    out = torch.empty(tokens, weight.out_features, dtype=x.dtype, device=x.device)
    tiles, chunks = weight.words.shape[:2]
    blocks = (-(-weight.out_features // tile.outputs), -(-tokens // tile.tokens))
    parts = splits(
        *(tile, weight.kind.bits, tokens, weight.out_features, chunks, _processors(x.device))
    )
    if blocks[0] * blocks[1] > COUNTERS:
        parts = 1
    shape = (parts, tokens, weight.out_features) if parts > 1 else (0,)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    tensors = (x, weight.words, weight.scales, weight.zeros, weight.bias, out, partial)
    problem = MatmulProblem(
        *(_address(tensor) for tensor in (*tensors, weight.arrived)),
        *(tokens, weight.out_features, inputs, x.stride(0), tiles, chunks),
    )
    text = matmul_text(weight.kind, tile, x.dtype)
    launch(text, problem, (*blocks, parts), tile.threads, tile.shared, x.device)
    return out


def dense_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """The same by cuBLAS, with as many rows made dense at a time as stay in the L2 cache."""
    x = _aligned(x)
    step = max(16, _DENSE_BYTES // (2 * x.shape[1]) // 256 * 256)
    out = torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device)
    for first in range(0, weight.out_features, step):
        end = min(first + step, weight.out_features)
        rows = dequantize(weight, (first, end), x.shape[1], x.dtype)
        part = out[:, first:end]
        if weight.bias is None:
            torch.mm(x, rows.T, out=part)
        else:
            torch.addmm(weight.bias[first:end].to(x.dtype), x, rows.T, out=part)
    return out


def dequantize(
    weight: PackedWeight, rows: tuple[int, int], inputs: int, dtype: torch.dtype
) -> Tensor:
    """Rows of the dense weight [out, inputs], the first a multiple of 16, inputs of 8."""
    first, end = rows
    out = torch.empty(end - first, inputs, dtype=dtype, device=weight.words.device)
    chunks = weight.words.shape[1]
    problem = DenseProblem(
        *(_address(tensor) for tensor in (weight.words, weight.scales, weight.zeros, out)),
        *(end - first, inputs, chunks, first // 16),
    )
    grid = (-(-chunks // DENSE_CHUNKS), -(-(end - first) // 16), 1)
    text = dense_text(weight.kind, dtype)
    launch(text, problem, grid, 32 * DENSE_CHUNKS, DENSE_SHARED, out.device)
    return out


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
def matmul_text(kind: WeightKind, tile: Tile, dtype: torch.dtype) -> str:
    return text_of(
        "matmul.cuh",
        "qx::Problem",
        matmul_instance(kind, tile, dtype),
        tile.threads,
        tile.shared,
        tile.blocks,
    )


@cache
def dense_text(kind: WeightKind, dtype: torch.dtype) -> str:
    return text_of(
        "dequantize.cuh", "qx::Dense", dense_instance(kind, dtype), 32 * DENSE_CHUNKS, DENSE_SHARED
    )


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
