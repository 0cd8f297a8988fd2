"""Memory for packed weights: one after the other on pages of 2 MiB, where the system has them.

A token reads every weight once; on pages of 4 KiB a fifth of that time goes into finding them.
"""

import mmap
import threading

import torch
from torch import Tensor

__all__ = ["Arena"]

_SLAB = 64 << 20  # of addresses: memory is taken as it is touched
_LINE = 64


class Arena:
    """Hands out uninitialized memory in lines of 64 bytes; it lives as long as its tensors."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """A uint8 tensor of `size` bytes that begins on a line."""
        with self._lock:
            if self._used + size > len(self._slab):
                self._slab, self._used = _slab(max(size, _SLAB)), 0
            taken = self._slab[self._used : self._used + size]
            self._used += -(-size // _LINE) * _LINE
        return taken

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values, contiguous, in here."""
        size = tensor.numel() * tensor.itemsize
        taken = self.take(size).view(tensor.dtype).view(tensor.shape)
        return taken.copy_(tensor)


def _slab(size: int) -> Tensor:
    if hasattr(mmap, "MAP_PRIVATE"):  # shared pages are never large ones
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
