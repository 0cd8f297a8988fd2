"""The Triton kernel: weights are decoded in registers and multiplied by `tl.dot`.

Nothing here is written for one machine: no inline assembly, so that it runs under Triton's
interpreter (TRITON_INTERPRET=1) as well as on every GPU that Triton compiles for.

Codes are split into planes of 1, 2, 4 or 8 bits (3 bits are a plane of two and one of one). A chunk
of inputs is the span that fills 16 words of the narrowest plane. In it, field f holds inputs
16f .. 16f+15, one in each of the 16 words, so that a field is a tile of 16 inputs that needs one
shift and one AND: word i of a plane of b bits has field f at bit f * b % 32 of its part f * b / 32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["FIELD", "matmul", "pack_plane"]

FIELD = 16  # inputs in a field: the least that tl.dot takes
_WORD = 32


def pack_plane(codes: Tensor, bits: int, fields: int) -> Tensor:
    """Codes [out, in] below 2**bits as int32 [chunks, parts, 16, out]; in is whole chunks."""
    out, inputs = codes.shape
    per_word = _WORD // bits
    parts = fields // per_word
    split = codes.view(out, inputs // (fields * FIELD), parts, per_word, FIELD).to(torch.int64)
    shifts = torch.arange(per_word, device=codes.device) * bits
    words = (split << shifts[:, None]).sum(3)  # [out, chunks, parts, 16]
    words = words.permute(1, 2, 3, 0)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x,
    low,
    high,
    scales,
    zeros,
    bias,
    out,
    M,
    N,
    K,
    chunks,
    chunks_per_split,
    stride_x,
    GROUP,
    ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FIELDS: tl.constexpr,
    SPAN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of outputs over some of the chunks. SPAN inputs at a time lie in one group."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 16)
    here = cols < N
    low_parts: tl.constexpr = FIELDS * LOW // 32
    high_parts: tl.constexpr = FIELDS * HIGH // 32
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(2) * chunks_per_split
    for chunk in range(first, tl.minimum(first + chunks_per_split, chunks)):
        begin = chunk * FIELDS * 16
        for f in tl.static_range(FIELDS):
            if f * LOW % 32 == 0:
                at = (chunk * low_parts + f * LOW // 32) * 16 + lane
                low_words = tl.load(
                    low + at[:, None].to(tl.int64) * N + cols[None, :], mask=here[None, :], other=0
                )
            if HIGH > 0:
                if f * HIGH % 32 == 0:
                    at = (chunk * high_parts + f * HIGH // 32) * 16 + lane
                    high_words = tl.load(
                        high + at[:, None].to(tl.int64) * N + cols[None, :],
                        mask=here[None, :],
                        other=0,
                    )
            if f * 16 % SPAN == 0:
                group = (begin + f * 16) // GROUP
                scale = tl.load(scales + group * N + cols, mask=here, other=0).to(tl.float32)
                if HAS_ZEROS:
                    zero = tl.load(zeros + group * N + cols, mask=here, other=0).to(tl.float32)
                part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            code = (low_words >> (f * LOW % 32)) & ((1 << LOW) - 1)
            if HIGH > 0:
                code = code | (((high_words >> (f * HIGH % 32)) & ((1 << HIGH) - 1)) << LOW)
            if HAS_ZEROS:
                weight = code.to(tl.float32) - zero[None, :]
            else:
                weight = code.to(tl.float32) - ZERO
            k = begin + f * 16 + lane
            values = tl.load(
                x + rows[:, None].to(tl.int64) * stride_x + k[None, :],
                mask=(rows < M)[:, None] & (k < K)[None, :],
                other=0,
            )
            if WIDE:
                values = values.to(tl.float32)
            part = tl.dot(values, weight.to(values.dtype), part, input_precision="ieee")
            if (f + 1) * 16 % SPAN == 0:
                total += part * scale[None, :]
    if HAS_BIAS:
        total += tl.load(bias + cols, mask=here, other=0).to(tl.float32)[None, :]
    place = (tl.program_id(2) * M + rows).to(tl.int64)
    tl.store(
        out + place[:, None] * N + cols[None, :],
        total.to(out.dtype.element_ty),
        mask=(rows < M)[:, None] & here[None, :],
    )


@torch.library.custom_op("qexport::triton_matmul", mutates_args=())
def matmul(
    x: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group: int,
    zero: float,
    low_bits: int,
    high_bits: int,
    span: int,
    splits: int,
) -> Tensor:
    """`x @ weight.T + bias` for x [tokens, in] in float32, float16 or bfloat16.

    low, high   planes of `pack_plane`; `high` for the upper bits of 3-bit codes
    scales      [groups, out], for whole chunks
    zeros       uint8 likewise; None where all have `zero`
    group       inputs that share a scale; `span` divides it and a chunk
    splits      parts of the inputs that are summed at the end, in their order
    """
    tokens, inputs = x.shape
    out_features = low.shape[-1]
    shape = (tokens, out_features) if splits == 1 else (splits, tokens, out_features)
    out = torch.empty(shape, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if not out.numel():
        return x.new_zeros(tokens, out_features)
    x = x.contiguous()
    fields = low.shape[1] * (_WORD // low_bits)
    block_m = 16 if tokens <= 16 else 64
    block_n = 64
    grid = (triton.cdiv(tokens, block_m), triton.cdiv(out_features, block_n), splits)
    _kernel[grid](
        *(x, low, low if high is None else high, scales, scales if zeros is None else zeros),
        *(scales if bias is None else bias, out, tokens, out_features, inputs),
        *(len(low), triton.cdiv(len(low), splits), inputs, group),
        ZERO=zero,
        HAS_ZEROS=zeros is not None,
        HAS_BIAS=bias is not None and splits == 1,
        LOW=low_bits,
        HIGH=high_bits,
        FIELDS=fields,
        SPAN=span,
        # the interpreter keeps bfloat16 as integers, and multiplies those
        WIDE=x.dtype == torch.bfloat16 and x.device.type == "cpu",
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        enable_fp_fusion=True,
    )
    if splits == 1:
        return out
    summed = out.sum(0)
    return (summed if bias is None else summed + bias).to(x.dtype)


@matmul.register_fake
def _(x: Tensor, low: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], low.shape[-1])
