"""Dense n-bit packing, one little-endian bitstream for every layout that needs one.

Code `j` of a row occupies bits `bits*j .. bits*j + bits - 1` of the row's stream, and bit `i` of
the stream is bit `i % 8` of byte `i // 8`. Read as little-endian int32 words this is the layout of
GPTQ's qweight (3-bit codes straddling words included), of compressed-tensors >= 0.18 and of the
native format, so that one packer serves all of them.

Eight codes are moved at once: they stand in the eight bytes of an int64 lane, and three steps of
shifting and masking bring pairs, then fours, then all eight together.
"""

import torch
from torch import Tensor

__all__ = ["pack", "packed_bytes", "unpack"]

_CHUNK = 1 << 18  # codes in flight: lanes stay in the cache, and ops too small to be parted


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes of `bits` bits takes."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` uint8 [rows, n], each below 2**bits, into uint8 [rows, ceil(n*bits/8)].

    The unused high bits of a row's last byte are zero. Raises ValueError on a width outside 1..8,
    another dtype or a code that does not fit.
    """
    _check(codes, bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    if bits == 8:
        return codes.clone()
    rows, n = codes.shape
    out = torch.empty(rows, packed_bytes(n, bits), dtype=torch.uint8, device=codes.device)
    for part in _row_chunks(rows, n):
        block = _padded(codes[part], 8)
        # flattened first: a side of 1 may have any stride, which `view` would trip over
        lanes = block.reshape(-1).view(torch.int64).view(block.shape[0], -1)
        for step in (1, 2, 4):
            lanes = _gather(lanes, step * bits, 8 * step)
        out[part] = _narrow(lanes, bits)[:, : out.shape[1]]
    return out


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`: uint8 [rows, ceil(count*bits/8)] to uint8 codes [rows, count]."""
    _check(packed, bits)
    if packed.shape[1] != packed_bytes(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes a row, "
            f"not {packed.shape[1]}"
        )
    if bits == 8:
        return packed.clone()
    rows = packed.shape[0]
    out = torch.empty(rows, count, dtype=torch.uint8, device=packed.device)
    for part in _row_chunks(rows, count):
        block = _padded(packed[part], bits)
        lanes = _widen(block.reshape(-1).view(block.shape), bits)
        for step in (4, 2, 1):
            lanes = _scatter(lanes, step * bits, 8 * step)
        out[part] = lanes.view(torch.uint8)[:, :count]
    return out


def _padded(rows: Tensor, multiple: int) -> Tensor:
    """Rows with zeros after them up to a multiple; themselves where nothing is wanting."""
    wanting = -rows.shape[1] % multiple
    return torch.nn.functional.pad(rows, (0, wanting)) if wanting else rows


def _gather(lanes: Tensor, field: int, stride: int) -> Tensor:
    """Fields of `field` bits that stand `stride` bits apart, joined in pairs."""
    low = _mask(field, 2 * stride)
    joined = (lanes >> (stride - field)).bitwise_and_(_signed(low << field))
    return joined.bitwise_or_(lanes & low)


def _scatter(lanes: Tensor, field: int, stride: int) -> Tensor:
    """Undo `_gather`."""
    low = _mask(field, 2 * stride)
    parted = (lanes << (stride - field)).bitwise_and_(_signed(low << stride))
    return parted.bitwise_or_(lanes & low)


def _mask(field: int, period: int) -> int:
    """`field` ones at the low end of every `period` bits of 64."""
    return sum(((1 << field) - 1) << at for at in range(0, 64, period))


def _signed(mask: int) -> int:
    """A 64-bit mask as the int64 with these bits."""
    mask &= (1 << 64) - 1
    return mask - (1 << 64) if mask >> 63 else mask


def _narrow(lanes: Tensor, bits: int) -> Tensor:
    """The low `bits` bytes of every int64 lane [rows, n] as uint8 [rows, n*bits]."""
    rows, n = lanes.shape
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(bits)
    if whole is not None:
        lowest = torch.empty(rows, n, dtype=whole, device=lanes.device)
        return lowest.copy_(lanes.view(whole)[:, :: 8 // bits]).view(torch.uint8)
    return lanes.view(torch.uint8).view(rows, n, 8)[:, :, :bits].reshape(rows, n * bits)


def _widen(packed: Tensor, bits: int) -> Tensor:
    """Undo `_narrow`, with zeros in the high bytes."""
    rows, width = packed.shape
    lanes = torch.zeros(rows, width // bits, dtype=torch.int64, device=packed.device)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(bits)
    if whole is not None:
        lanes.view(whole)[:, :: 8 // bits] = packed.view(whole)
    else:
        lanes.view(torch.uint8).view(rows, -1, 8)[:, :, :bits] = packed.view(rows, -1, bits)
    return lanes


def _row_chunks(rows: int, n: int) -> list[slice]:
    step = max(1, _CHUNK // max(n, 1))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _check(tensor: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"widths are 1 to 8 bits, not {bits}")
    if tensor.dtype != torch.uint8 or tensor.dim() != 2:
        raise ValueError(f"expected uint8 [rows, n], got {tensor.dtype} {tuple(tensor.shape)}")
