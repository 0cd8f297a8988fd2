"""How many tokens each slot of a decoder may hold: by the model, the user and the memory."""

from collections.abc import Callable

import torch

from qexport.errors import InputError, UnsupportedError
from qexport.runtime.machine import memory_bytes

__all__ = ["cache_context", "free_memory", "token_bytes"]

_SHARE = 0.5  # of free memory that the cache of all slots may come to, unless the user wants more


def token_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    return 2 * layers * kv_heads * head_dim * dtype.itemsize


def free_memory(device: torch.device, weights: int) -> int:
    """Bytes that are left beside `weights` bytes which are still to be loaded.

    Raises UnsupportedError where they do not fit.
    """
    on_gpu = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[0] if on_gpu else memory_bytes()
    if weights >= memory:
        raise UnsupportedError(
            f"the weights take {weights / 2**30:.1f} GiB, and the memory is "
            f"{memory / 2**30:.1f}; take fewer bits or a smaller model."
        )
    return memory - weights


def cache_context(
    asked: int | None, most: int, *, slots: int, token: int, memory: Callable[[], int]
) -> int:
    """Tokens of each of `slots`: those asked for, or what fits of the `most` that the model has.

    `token` is `token_bytes`, and `memory` tells what is free. Raises InputError where more is asked
    for than the model or the machine has.
    """
    if asked is None:
        return max(1, min(most, int(memory() * _SHARE) // (token * slots)))
    if asked > most:
        raise InputError(f"the model has a context of {most}; {asked} is more than that.")
    wanted, free = token * slots * asked, memory()
    if wanted > free:
        raise InputError(
            f"the cache of {slots} slots of {asked} tokens takes {wanted / 2**30:.0f} GiB, and "
            f"{free / 2**30:.0f} are free; take fewer slots or a smaller context."
        )
    return asked
