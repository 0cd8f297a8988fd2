"""Functions of whole weights, compiled so that they pass over memory once (`torch.compile`)."""

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["compiled"]

# Sizes are variables, as a model has a handful of shapes; the constants of a grid are constants.
_OPTIONS = {"specialize_float": True, "recompile_limit": 64}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled when it is first called with arguments of a new kind."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch._dynamo.config.patch(_OPTIONS):
            return _compiler(function)(*args)

    return call


@functools.cache
def _compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)
