"""The processes of one run: how many, which one this is, and what is spread over them.

One process is the usual case, and everything here is then nothing. `torchrun` and `accelerate
launch` start more; what they share is the run's folder, which all of them have to see.
"""

import atexit
import os
import sys
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from qexport.errors import QexportError

__all__ = [
    "assign",
    "barrier",
    "count_processes",
    "is_main",
    "join",
    "largest",
    "leave",
    "like",
    "rank",
    "summed",
    "whole",
    "world_size",
]

_LONGEST = timedelta(days=2)  # that some wait for the first, while it trains blocks, say


def world_size() -> int:
    """Processes, as they were started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this one writes and speaks."""
    return rank() == 0


def largest(tensor: Tensor) -> Tensor:
    """The greatest of what every process has, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return tensor


def summed(tensor: Tensor) -> Tensor:
    """The sum of what every process has, in place; all of them have to ask."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def join(*, deepspeed: bool = False, offload: bool = False) -> None:
    """Meet the other processes; with `offload` what is kept in hosts' memory is summed there."""
    if deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(timeout=_LONGEST)
    elif world_size() > 1:
        gpu = torch.cuda.is_available()
        backend = {"backend": "cuda:nccl,cpu:gloo"} if gpu and offload else {}
        PartialState(cpu=not gpu, timeout=_LONGEST, **backend)


def leave() -> None:
    """End this process, where there are others, once all is done and said; else, nothing.

    Python itself is not taken down: a thread of gloo that frees a tensor while the interpreter
    shuts down waits for its lock, and aborts the process. Those threads cannot be stopped first, as
    torch's caches keep the meshes of a sharded model, and these keep the process group.
    """
    if world_size() > 1:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def count_processes() -> None:
    """Tell accelerate how many there are: under DeepSpeed it counts those with a GPU."""
    state = PartialState()
    state.num_processes = world_size()
    state.process_index = int(os.environ["RANK"])
    state.local_process_index = int(os.environ["LOCAL_RANK"])


def barrier() -> None:
    """Wait until all are here. Raises QexportError where one has ended instead."""
    if world_size() > 1:
        try:
            PartialState().wait_for_everyone()
        except RuntimeError as error:  # a connection of gloo's or NCCL's that was closed
            raise QexportError(
                "another process of this run has ended; the reason is what it said."
            ) from error


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which every process may hold a part; all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole value, spread and placed as `tensor` is."""
    value = value.to(tensor.device)
    if isinstance(tensor, DTensor):
        return distribute_tensor(value, tensor.device_mesh, tensor.placements)
    return value


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Put a whole value into a tensor that may be spread."""
    tensor.copy_(like(value, tensor))
