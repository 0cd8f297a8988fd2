"""FSDP2: weights, gradients and moments are spread over all processes, block by block."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from qexport.blocks import Blocks
from qexport.checkpoint import Checkpoint
from qexport.modelling import allocate, meta_model
from qexport.ranks import world_size
from qexport.training.block import prepared_block
from qexport.training.config import TrainConfig
from qexport.training.prepare import store

__all__ = ["load_sharded"]


def load_sharded(
    config: TrainConfig, source: Checkpoint, stored: torch.dtype, blocks: Path, *, fused: bool
) -> Any:
    """A prepared model that is spread over all processes, with the blocks that are trained already.

    No process ever holds it whole: each reads one block, keeps its part of it, and goes on. Masters
    are what is spread: a block's are gathered when it runs, and quantized there, whole. With
    `offload`, parts stay in their host's memory between uses.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = OffloadPolicy()
    if config.offload:
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    model = meta_model(source)
    model.config.use_cache = False
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config=model.config).to(device)
    makers = Blocks(source, torch.float32, device)
    for index in range(len(makers)):
        made = prepared_block(
            makers,
            index,
            config.scheme_of,
            config.scale_init,
            stored,
            config.settings.gradient,
            fused=fused,
            trained=blocks,
        )
        fully_shard(made, mesh=mesh, offload_policy=policy)
        body.layers[index] = made
    _fill_rest(model, source, stored, device)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    # transformers' Trainer then leaves placement and gradients alone, instead of wrapping it in DDP
    model._is_distributed_loading_by_transformers = True
    return model


def _fill_rest(model: Any, source: Checkpoint, stored: torch.dtype, device: torch.device) -> None:
    """Embeddings, the last norm and the head, which may be the embeddings again."""
    places = {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    if not tied:
        places["lm_head"] = model.lm_head
    for prefix, module in places.items():
        allocate(model, module, device)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(source.dense(f"{prefix}.{name}").float())
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
        places["lm_head"] = model.lm_head
    for module in places.values():
        for name, _ in list(module.named_parameters(recurse=False)):
            store(module, name, stored)
