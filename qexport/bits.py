"""Dense n-bit packing, one little-endian bitstream for every layout that needs one.

Code `j` of a row occupies bits `bits*j .. bits*j + bits - 1` of the row's stream, and bit `i` of
the stream is bit `i % 8` of byte `i // 8`. Read as little-endian int32 words this is the layout of
GPTQ's qweight (3-bit codes straddling words included), of compressed-tensors >= 0.18 and of the
native format, so that one packer serves all of them.
"""

import torch
from torch import Tensor

__all__ = ["pack", "packed_bytes", "unpack"]

# Codes are moved through 64-bit lanes (8 codes to `bits` bytes); this bounds what is in flight.
_CHUNK = 1 << 22


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
    out = torch.empty(rows, packed_bytes(n, bits), dtype=torch.uint8)
    shifts = torch.arange(8, dtype=torch.int64) * bits
    byte_shifts = torch.arange(bits, dtype=torch.int64) * 8
    for part in _row_chunks(rows, n):
        block = torch.nn.functional.pad(codes[part], (0, -n % 8)).view(-1, 8).long()
        words = (block << shifts).sum(-1, keepdim=True)
        packed = ((words >> byte_shifts) & 0xFF).to(torch.uint8)
        out[part] = packed.view(out[part].shape[0], -1)[:, : out.shape[1]]
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
    out = torch.empty(rows, count, dtype=torch.uint8)
    shifts = torch.arange(8, dtype=torch.int64) * bits
    byte_shifts = torch.arange(bits, dtype=torch.int64) * 8
    for part in _row_chunks(rows, count):
        block = torch.nn.functional.pad(packed[part], (0, -packed.shape[1] % bits))
        words = (block.view(-1, bits).long() << byte_shifts).sum(-1, keepdim=True)
        codes = ((words >> shifts) & ((1 << bits) - 1)).to(torch.uint8)
        out[part] = codes.view(block.shape[0], -1)[:, :count]
    return out


def _row_chunks(rows: int, n: int) -> list[slice]:
    step = max(1, _CHUNK // max(n, 1))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _check(tensor: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"widths are 1 to 8 bits, not {bits}")
    if tensor.dtype != torch.uint8 or tensor.dim() != 2:
        raise ValueError(f"expected uint8 [rows, n], got {tensor.dtype} {tuple(tensor.shape)}")
