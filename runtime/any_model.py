"""Any architecture that transformers models, its quantized layers multiplied by our kernels."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qexport.checkpoint import Checkpoint
from qexport.modelling import build_model
from qexport.runtime.context import cache_context, free_memory, token_bytes
from qexport.runtime.kernels import Linear, choose
from qexport.runtime.loader import read_tensor
from qexport.runtime.model import Decoder, Span

__all__ = ["AnyDecoder"]

_CONTEXT = 2048  # where a config does not say how long a sequence may be, or how large its cache is


class AnyDecoder(Decoder):
    """A slower decoder: the spans of a step run one after the other, each with its own cache."""

    chunked = False  # transformers' longrope and dynamic rope look at one call's positions

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        slots: int,
        context: int | None,
        device: torch.device,
        dtype: torch.dtype,
        kernel: str | None = None,
    ) -> None:
        from transformers import DynamicCache

        self._model = build_model(checkpoint, dtype, partial(read_tensor, checkpoint, dtype))
        names = _replace(self._model, checkpoint, device, kernel, dtype)
        self._model.to(device).eval()
        config = self._model.config.get_text_config()
        self.slots, self.vocabulary = slots, int(config.vocab_size)
        token = _token_bytes(config, dtype)
        most = int(getattr(config, "max_position_embeddings", _CONTEXT))
        self.context = cache_context(
            context,
            most if token else min(most, _CONTEXT),
            slots=slots,
            token=token or 1,
            # what is on a GPU by now is no longer free there
            memory=partial(
                free_memory, device, 0 if device.type == "cuda" else _bytes(self._model)
            ),
        )
        self.kernels = f"{', '.join(sorted(names))} in transformers' {type(self._model).__name__}"
        self._new_cache = partial(DynamicCache, config=config)
        self._caches: list[Any] = [self._new_cache() for _ in range(slots)]
        self._device = device
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        self._moving = _moves(rope)

    def reusable(self, slot: int, held: int, shared: int, length: int) -> int:
        """Only a cache that keeps everything gives tokens back, and only if positions stay."""
        from transformers.cache_utils import DynamicLayer

        whole = all(type(layer) is DynamicLayer for layer in self._caches[slot].layers)
        return shared if whole and not self._moving else 0

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Tensor:
        rows = [self._one(span) for span in spans]
        wanted = [row for row, span in zip(rows, spans, strict=True) if span.logits]
        return torch.stack(wanted) if wanted else torch.empty(0, self.vocabulary)

    def _one(self, span: Span) -> Tensor:
        cache = self._caches[span.slot]
        if span.start == 0:
            cache = self._caches[span.slot] = self._new_cache()
        elif (surplus := cache.get_seq_length() - span.start) > 0:
            cache.crop(-surplus)
        ids = torch.tensor([span.tokens], device=self._device)
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[0, -1].float().cpu()
        return logits


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _token_bytes(config: Any, dtype: torch.dtype) -> int:
    """What a token takes in the cache; 0 where the config does not say it as Llama's does."""
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and type(heads) is int and heads:
        head_dim = getattr(config, "hidden_size", 0) // heads
    layers = getattr(config, "num_hidden_layers", None)
    sizes = [size for size in (layers, kv_heads, head_dim) if type(size) is int and size > 0]
    return token_bytes(sizes[0], sizes[1], sizes[2], dtype) if len(sizes) == 3 else 0


def _moves(rope: Any) -> bool:
    """Whether a token's angles depend on the length of the prompt; `rope` may be one per kind of
    layer."""
    if not isinstance(rope, dict):
        return False
    kind = rope.get("rope_type", rope.get("type"))
    return kind in ("longrope", "dynamic") or any(map(_moves, rope.values()))


class _KernelLinear(nn.Module):
    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = self.linear.matmul(x.reshape(-1, self.in_features))
        return rows.view(*x.shape[:-1], self.out_features)


def _replace(
    model: nn.Module,
    checkpoint: Checkpoint,
    device: torch.device,
    kernel: str | None,
    dtype: torch.dtype,
) -> set[str]:
    """Put kernels in the place of quantized linear layers; returns the names of those chosen."""
    names = {"reference"} if not checkpoint.modules else set()
    modules = dict(model.named_modules())
    for name, (scheme, shape) in checkpoint.modules.items():
        module = modules.get(name)
        chosen = choose(scheme, shape, device, kernel, dtype).kernel
        if chosen.name == "reference" or not isinstance(module, nn.Linear):
            names.add("reference")
            continue
        names.add(chosen.name)
        linear = chosen.prepack(checkpoint.quantized(f"{name}.weight").to(device), module.bias)
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, _KernelLinear(linear))
    return names
