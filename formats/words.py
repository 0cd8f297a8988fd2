"""Dense bitstreams in int32 words, as GPTQ, compressed-tensors and humming keep them."""

import torch
from torch import Tensor

from qexport import bits
from qexport.errors import CheckpointError
from qexport.grid import dtype_name
from qexport.shards import ShardReader

__all__ = ["WORD", "from_words", "in_words", "scale_dtype_of", "words"]

WORD = 32


def words(count: int, width: int) -> int:
    """Words that a row of `count` codes takes."""
    return -(-count * width // WORD)


def in_words(codes: Tensor, width: int) -> Tensor:
    """uint8 codes [rows, n] as int32 [rows, ceil(n*width/32)], the last word filled with zeros."""
    packed = bits.pack(codes, width)
    whole = torch.zeros(len(packed), words(codes.shape[1], width) * 4, dtype=torch.uint8)
    whole[:, : packed.shape[1]] = packed
    return whole.view(torch.int32)


def from_words(packed: Tensor, width: int, count: int) -> Tensor:
    """Undo `in_words`."""
    stream = packed.contiguous().view(torch.uint8)
    return bits.unpack(stream[:, : bits.packed_bytes(count, width)].contiguous(), width, count)


def scale_dtype_of(reader: ShardReader, name: str) -> torch.dtype:
    """The dtype of a scale tensor. Raises CheckpointError where it is none for scales."""
    dtype = reader.dtype(name)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise CheckpointError(f"{reader.folder}: {name} has dtype {dtype_name(dtype)}.")
    return dtype
