"""DeepSpeed's ZeRO: its configuration, and whole tensors out of the parts that it keeps.

DeepSpeed holds float32 masters here, as the other ways of training do: it is given no bf16 or fp16
section, and multiplies in bfloat16 by autocast. What it keeps is read and written through its own
functions for whole values, so that checkpoints are those of any other run, and never pickles.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexport.errors import InputError

__all__ = ["configuration", "load_moments", "moments"]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_OURS = ("optimizer", "scheduler", "bf16", "fp16", "amp", "torch_autocast", "train_batch_size")


def configuration(
    path: Path, *, batch_size: int, gradient_accumulation: int, bf16: bool
) -> dict[str, Any]:
    """A user's file, with what qexport's own options say.

    Raises InputError for a file that is none, or that says any of that itself.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--deepspeed {path} cannot be read as JSON ({error}).") from error
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization"), dict):
        raise InputError(f'--deepspeed {path} has no "zero_optimization".')
    for key in _OURS:
        if key in found:
            raise InputError(
                f"--deepspeed {path}: leave out {key!r}; qexport's options for rates, batch and "
                "precision stand in its place, over float32 masters."
            )
    if found["zero_optimization"].get("stage") not in (1, 2):
        raise InputError(f"--deepspeed {path} is not of stage 1 or 2; --shard spreads weights too.")
    return {
        "gradient_clipping": 1.0,  # transformers' default, as without DeepSpeed
        **found,
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": gradient_accumulation,
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
    }


def moments(model: nn.Module, optimizer: Any) -> dict[Tensor, dict[str, Any]]:
    """AdamW's state of every parameter, whole; all processes have to ask."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(optimizer)
    step = next(iter(_inner(optimizer).state.values()))["step"]
    return {
        parameter: {
            "step": step,
            **{key: safe_get_full_optimizer_state(parameter, key).clone() for key in _MOMENTS},
        }
        for parameter in model.parameters()
    }


def load_moments(optimizer: Any, found: Iterable[tuple[Tensor, str, Any]], step: Tensor) -> None:
    """Put what `moments` has given into an optimizer that has made no step.

    found   parameter, key and value; step: how many it has made, float32 []
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    inner = _inner(optimizer)
    for group in inner.param_groups:
        for flat in group["params"]:
            made = {key: torch.zeros_like(flat) for key in _MOMENTS}
            place = flat.device if group.get("fused") else "cpu"
            inner.state[flat] = {"step": step.clone().to(place), **made}
    _link(optimizer)
    for parameter, key, value in found:
        if key in _MOMENTS:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _link(optimizer: Any) -> None:
    """DeepSpeed links the moments of all groups once the first group has some; link them again."""
    while not hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer = optimizer.optimizer
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The one within, whose parameters are the flat parts of this process."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
