"""Functions of whole weights, compiled so that they pass over memory once (`torch.compile`)."""

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["compiled"]

# One piece of code for each shape and grid, as sizes that vary cost a division a weight. A model
# has a handful; a process that trains many models has more than torch expects of one function.
_LIMITS = {"recompile_limit": 1 << 12, "accumulated_recompile_limit": 1 << 12}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled when it is first called with arguments of a new kind."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch._dynamo.config.patch(_LIMITS):
            return _compiler(function)(*args)

    return call


@functools.cache
def _compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)
