"""What a decoding step does between its products, in Triton: norms, rope, attention, gates.

One token for each sequence of a batch. Every function rounds where `TorchDecoder` does, so that
both give the same but for the order of sums. Nothing here is written for one machine: it runs under
Triton's interpreter, too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_norm", "attend", "gate", "rotate_and_store"]

_KEYS = 64  # at most, that a program of attention looks at together
_ROW_BYTES = 256  # of keys, for so many; longer rows are looked at in smaller parts
_LEAST = 16  # rows that tl.dot takes
_EXACT = {"enable_fp_fusion": False}  # a product is rounded before it is added to, as torch does


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    x, delta, weight, out, scale, eps, SIZE, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
):
    """A row of x, and of x plus `delta`, which x then is."""
    row = tl.program_id(0).to(tl.int64) * SIZE
    at = tl.arange(0, BLOCK)
    here = at < SIZE
    value = tl.load(x + row + at, mask=here, other=0)
    if HAS_DELTA:
        added = (tl.load(delta + row + at, mask=here, other=0).to(tl.float32) * scale).to(
            value.dtype
        )
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(x + row + at, value, mask=here)
    wide = value.to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide) / SIZE + eps)
    normed = tl.load(weight + at, mask=here, other=0) * (wide * root)
    tl.store(out + row + at, normed.to(value.dtype), mask=here)


def add_norm(x: Tensor, delta: Tensor | None, scale: float, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x + delta * scale [batch, size]; x becomes that sum. weight is float32."""
    out = torch.empty_like(x)
    size = x.shape[1]
    _add_norm[(len(x),)](
        *(x, x if delta is None else delta, weight, out, scale, eps, size),
        HAS_DELTA=delta is not None,
        BLOCK=triton.next_power_of_2(size),
        **_EXACT,
    )
    return out


@triton.jit
def _rotate_and_store(  # type: ignore[no-untyped-def]
    heads,
    q_norm,
    k_norm,
    cos,
    sin,
    slots,
    positions,
    queries,
    cache,
    eps,
    H,
    KVH,
    CONTEXT,
    SLOTS,
    HALF,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A head of a token: to the queries, or to its place in the cache."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    here = at < DIM
    row = heads + (token.to(tl.int64) * (H + 2 * KVH) + head) * DIM
    value = tl.load(row + at, mask=here, other=0)
    kind = value.dtype
    is_query = head < H
    is_value = head >= H + KVH
    # what stands half a rotation away
    other = tl.where(at < HALF, at + HALF, tl.where(at < 2 * HALF, at - HALF, at))
    partner = tl.load(row + other, mask=here, other=0)
    if not is_value:
        if NORMED:
            wide = value.to(tl.float32)
            root = tl.rsqrt(tl.sum(wide * wide) / DIM + eps)
            weight = q_norm if is_query else k_norm
            value = (tl.load(weight + at, mask=here, other=0) * (wide * root)).to(kind)
            away = tl.load(weight + other, mask=here, other=0)
            partner = (away * (partner.to(tl.float32) * root)).to(kind)
        if ROTATED:
            turning = at < 2 * HALF
            angle = token * HALF + at % HALF
            c = tl.load(cos + angle, mask=turning, other=1)
            s = tl.load(sin + angle, mask=turning, other=0)
            v = value.to(tl.float32)
            p = partner.to(tl.float32)
            turned = tl.where(at < HALF, v * c - p * s, v * c + p * s)
            value = tl.where(turning, turned, v).to(kind)
    if is_query:
        tl.store(queries + (token.to(tl.int64) * H + head) * DIM + at, value, mask=here)
    else:
        slot = tl.load(slots + token)
        place = tl.where(is_value, SLOTS, 0) + slot
        place = place * KVH + (head - H) % KVH
        place = place * CONTEXT + tl.load(positions + token)
        tl.store(cache + place * DIM + at, value, mask=here & (at >= tl.where(slot < 0, DIM, 0)))


def rotate_and_store(
    heads: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    rotation: tuple[Tensor, Tensor] | None,
    slots: Tensor,
    positions: Tensor,
    cache: Tensor,
    eps: float,
) -> Tensor:
    """Queries [batch, heads, dim] of heads [batch, heads + 2 kv_heads, dim]; the rest is stored.

    cache      [2, slots, kv_heads, context, dim], contiguous; slots, positions: int64 [batch];
               nothing is stored for slot -1
    norms      float32 [dim] of queries and keys; rotation: cos and sin, float32 [batch, half]
    """
    batch, dim = heads.shape[0], heads.shape[2]
    _, places, kv_heads, context, _ = cache.shape
    count = heads.shape[1] - 2 * kv_heads
    queries = torch.empty(batch, count, dim, dtype=heads.dtype, device=heads.device)
    _rotate_and_store[(batch, heads.shape[1])](
        *(heads, *(norms or (heads, heads)), *(rotation or (heads, heads)), slots, positions),
        *(queries, cache, eps, count, kv_heads, context, places),
        1 if rotation is None else rotation[0].shape[1],
        ROTATED=rotation is not None,
        NORMED=norms is not None,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        **_EXACT,
    )
    return queries


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    queries,
    cache,
    slots,
    positions,
    sums,
    tops,
    scale,
    window,
    KVH,
    CONTEXT,
    SLOTS,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The queries that share a head's keys, over one part of the keys."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    slot = tl.load(slots + token)
    end = tl.where(slot < 0, 0, tl.load(positions + token) + 1)
    first = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    length = tl.cdiv(tl.cdiv(end - first, SPLITS), KEYS) * KEYS
    begin = first + part * length
    end = tl.minimum(begin + length, end)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK)
    lane = tl.arange(0, KEYS)
    row_here = rows < GROUP
    dim_here = dims < DIM
    query = (token.to(tl.int64) * KVH + head) * GROUP + rows
    q = tl.load(
        queries + query[:, None] * DIM + dims[None, :],
        mask=row_here[:, None] & dim_here[None, :],
        other=0,
    )
    keys = cache + (slot * KVH + head) * CONTEXT * DIM
    values = cache + ((SLOTS + slot) * KVH + head) * CONTEXT * DIM
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, BLOCK), tl.float32)
    for at in range(begin, end, KEYS):
        place = at + lane
        there = place < end
        k = tl.load(
            keys + place[None, :] * DIM + dims[:, None],
            mask=there[None, :] & dim_here[:, None],
            other=0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrunk = tl.exp(top - higher)
        weights = tl.exp(scores - higher[:, None])
        v = tl.load(
            values + place[:, None] * DIM + dims[None, :],
            mask=there[:, None] & dim_here[None, :],
            other=0,
        )
        total = total * shrunk + tl.sum(weights, 1)
        mixed = mixed * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    # [token, kv head, query, part]
    out = query * SPLITS + part
    tl.store(tops + out * 2, top, mask=row_here)
    tl.store(tops + out * 2 + 1, total, mask=row_here)
    tl.store(
        sums + out[:, None] * DIM + dims[None, :],
        mixed,
        mask=row_here[:, None] & dim_here[None, :],
    )


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    sums,
    tops,
    out,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The parts of one query, together; nothing of a query without keys."""
    query = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    parts = tl.arange(0, PARTS)
    there = parts < SPLITS
    at = query * SPLITS + parts
    highest = tl.load(tops + at * 2, mask=there, other=float("-inf"))
    top = tl.maximum(tl.max(highest), -1e30)
    shrunk = tl.exp(highest - top)
    total = tl.sum(shrunk * tl.load(tops + at * 2 + 1, mask=there, other=0))
    mixed = tl.load(
        sums + at[:, None] * DIM + dims[None, :],
        mask=there[:, None] & (dims < DIM)[None, :],
        other=0,
    )
    value = tl.sum(mixed * shrunk[:, None], 0) / tl.where(total > 0, total, 1)
    tl.store(out + query * DIM + dims, value.to(out.dtype.element_ty), mask=dims < DIM)


def attend(
    queries: Tensor,
    cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    splits: int,
) -> Tensor:
    """Attention of one token each over the keys up to its own; [batch, heads * dim].

    queries [batch, heads, dim]; cache [2, slots, kv_heads, context, dim]; window: 0 for all keys;
    splits: parts of the keys that different programs take (Dao et al., Flash-Decoding). Slot -1 has
    no keys.
    """
    batch, heads, dim = queries.shape
    _, places, kv_heads, context, _ = cache.shape
    group = heads // kv_heads
    sums = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=queries.device)
    tops = torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=queries.device)
    block = max(_LEAST, triton.next_power_of_2(dim))
    _attend[(batch, kv_heads, splits)](
        *(queries, cache, slots, positions, sums, tops, scale, window, kv_heads, context, places),
        GROUP=group,
        DIM=dim,
        ROWS=max(_LEAST, triton.next_power_of_2(group)),
        BLOCK=block,
        KEYS=max(_LEAST, min(_KEYS, _KEYS * _ROW_BYTES // (block * queries.itemsize))),
        SPLITS=splits,
        **_EXACT,
    )
    out = torch.empty_like(queries)
    _join[(batch * heads,)](
        *(sums, tops, out),
        DIM=dim,
        BLOCK=block,
        SPLITS=splits,
        PARTS=triton.next_power_of_2(splits),
        **_EXACT,
    )
    return out.view(batch, heads * dim)


@triton.jit
def _gate(gated, out, SIZE, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < SIZE
    first = tl.load(gated + row * 2 * SIZE + at, mask=here, other=0)
    second = tl.load(gated + row * 2 * SIZE + SIZE + at, mask=here, other=0)
    wide = first.to(tl.float32)
    opened = (wide / (1 + tl.exp(-wide))).to(first.dtype)
    tl.store(out + row * SIZE + at, opened * second, mask=here)


def gate(gated: Tensor) -> Tensor:
    """silu(first half) * second half of [batch, 2 * size]."""
    batch, size = gated.shape[0], gated.shape[1] // 2
    out = torch.empty(batch, size, dtype=gated.dtype, device=gated.device)
    block = 1024
    _gate[(batch, triton.cdiv(size, block))](gated, out, size, BLOCK=block, **_EXACT)
    return out
