"""Processes that end with the one that started them."""

import ctypes
import signal
import sys

__all__ = ["end_with_parent"]


def end_with_parent() -> None:
    """In a child, before it becomes its program: end when the parent does, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
