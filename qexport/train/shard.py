"""FSDP2: weights, gradients and moments are spread over all processes, block by block."""

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from qexport.train.ranks import world_size

__all__ = ["shard"]


def shard(model: Any, *, offload: bool) -> None:
    """Spread a prepared `model` in place; every process has loaded the same one.

    Masters are what is spread: a block's are gathered when it runs, and quantized there, whole.

    offload   keeps each process's part in its host's memory between uses
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (world_size(),))
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    # transformers' Trainer then leaves placement and gradients alone, instead of wrapping it in DDP
    model._is_distributed_loading_by_transformers = True
