"""Processes that end with the one that started them, and what they answer."""

import ctypes
import signal
import sys
import urllib.request
from http.client import HTTPException
from typing import Any

__all__ = ["NOT_YET", "end_with_parent", "open_local"]

NOT_YET = (OSError, HTTPException)  # what asking a server that is still starting may raise
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says


def open_local(request: "str | urllib.request.Request", timeout: float) -> Any:
    """As urllib's `urlopen`, of a server on this machine."""
    return _DIRECT.open(request, timeout=timeout)


def end_with_parent() -> None:
    """In a child, before it becomes its program: end when the parent does, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
