"""The sizes that a config.json gives, checked before anything is made of them."""

from typing import Any

from qexport.errors import CheckpointError

__all__ = ["check_sizes"]

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "vocab_size",
)
_MORE_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
_LARGEST = {"num_hidden_layers": 4096, "max_position_embeddings": 1 << 30}
_LARGEST_SIZE = 1 << 22  # what none of any model exceeds


def check_sizes(config: dict[str, Any], *, whole: bool = False) -> None:
    """Raise CheckpointError for a size that no model has: config classes make lists as long.

    `whole`: all that a Llama-like model needs have to be there. Others have sizes that are lists,
    or of other names, which are left alone.
    """
    for name in (*_SIZES, *_MORE_SIZES):
        value = config.get(name)
        if value is None:
            if whole and name in _SIZES:
                raise CheckpointError(f"config.json does not say {name}.")
            continue
        if isinstance(value, list) and not whole:
            continue
        most = _LARGEST.get(name, _LARGEST_SIZE)
        if type(value) is not int or not 0 < value <= most:
            raise CheckpointError(
                f"config.json's {name} is {str(value)[:40]}, not a number from 1 to {most}."
            )
