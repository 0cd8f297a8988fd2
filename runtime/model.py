"""The decoder of the Llama family: its weights, one step's tokens, and the step itself in torch.

`Decoder` is what the engine drives: it keeps a cache of `slots` sequences and runs spans of their
tokens. `TorchDecoder` does that with torch on any device, its linear layers with any kernel;
`cpu_model.CpuDecoder` does the same in C++.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention, silu

from qexport.checkpoint import Checkpoint
from qexport.runtime.device_sampler import Draw
from qexport.runtime.families import DecoderConfig
from qexport.runtime.kernels import Linear, choose
from qexport.runtime.kernels.reference import ReferenceKernel
from qexport.runtime.weights import (
    LayerWeights,
    Weight,
    read_dense,
    read_embedding,
    read_head,
    read_layer,
)

__all__ = ["Decoder", "Span", "TorchDecoder"]


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence.

    start   position of the first; what the slot holds before it stays, what it holds after is
            forgotten
    length  tokens that the sequence is known to have, this span's and a prompt's rest included:
            longrope chooses by it
    logits  whether those of the last token are wanted
    """

    slot: int
    start: int
    tokens: Sequence[int]
    length: int
    logits: bool = True


class Decoder(ABC):
    """A model with a cache of `slots` sequences of at most `context` tokens each.

    chunked   a prompt may be run in parts; not where positions depend on what a call sees
    draws     it has `choose`
    """

    chunked = True
    draws = False
    slots: int
    context: int
    vocabulary: int
    kernels: str  # that multiply, for people

    def reusable(self, slot: int, held: int, shared: int, length: int) -> int:
        """How many of the first `shared` tokens in a slot's cache serve another prompt.

        The sequence that left them was known to have `held` tokens, and the prompt has `length`.
        """
        return shared

    def reserve(self) -> int:
        """Take all memory of the cache now, which else comes as it is touched; bytes of it.

        A server that could run out of memory is to do so before it has clients.
        """
        return 0

    @abstractmethod
    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Run spans of different slots; float32 logits [spans that want them, vocabulary].

        The next call may write over them.
        """

    def choose(self, spans: Sequence[Span], draws: Sequence[Draw]) -> list[int]:
        """The same, and tokens of the spans that want logits; NO_TOKEN where these are NaN."""
        raise NotImplementedError


class _Joined(Linear):
    """Several matrices over the same inputs, one after the other."""

    def __init__(self, parts: list[Linear]) -> None:
        self._parts = parts
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)

    def matmul(self, x: Tensor) -> Tensor:
        return torch.cat([part.matmul(x) for part in self._parts], dim=-1)


@dataclass
class _Layer:
    norm1: Tensor
    norm2: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: Linear
    o: Linear
    up: Linear
    down: Linear


class TorchDecoder(Decoder):
    """The decoder in torch. But for rounding, logits do not depend on the other spans of a step.

    The cache is [layers, 2, slots, kv_heads, context, head_dim] in `dtype`, which is also what
    activations are.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        *,
        slots: int,
        context: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        kernel: str | None = None,
        head_bits: int | None = None,
    ) -> None:
        self.slots, self.context, self.vocabulary = slots, context, config.vocabulary
        self._config, self._device, self._dtype = config, device, dtype
        self._names: set[str] = set()
        prepack = self._prepacker(kernel)
        read = [
            self._layer(read_layer(checkpoint, config, layer), prepack)
            for layer in sorted(set(config.weights))
        ]
        self._layers = [read[layer] for layer in config.weights]
        self._embedding = read_embedding(checkpoint, config).to(device)
        self._norm = (
            read_dense(checkpoint, "model.norm.weight", (config.hidden,)).float().to(device)
        )
        self._head = prepack([read_head(checkpoint, config, head_bits)])
        self._rope = [table.to(device) for table in (config.rope.short, config.rope.long)]
        shape = (config.layers, 2, slots, config.kv_heads, context, config.head_dim)
        self._cache = torch.zeros(shape, dtype=dtype, device=device)
        self.kernels = ", ".join(sorted(self._names))

    def reserve(self) -> int:
        return self._cache.zero_().nbytes

    def _prepacker(self, kernel: str | None) -> Callable[[list[Weight]], Linear]:
        dense = ReferenceKernel(self._dtype)

        def prepack(weights: list[Weight]) -> Linear:
            parts: list[Linear] = []
            for weight, bias in weights:
                offset = None if bias is None else bias.to(self._device)
                if isinstance(weight, Tensor):
                    parts.append(dense.wrap(weight.to(self._device), offset))
                    continue
                scheme, shape = weight.scheme, weight.shape
                chosen = choose(scheme, shape, self._device, kernel, self._dtype).kernel
                self._names.add(chosen.name)
                if chosen.name == "reference":
                    chosen = dense
                parts.append(chosen.prepack(weight.to(self._device), offset))
            return parts[0] if len(parts) == 1 else _Joined(parts)

        return prepack

    def _layer(self, weights: LayerWeights, prepack: Callable[[list[Weight]], Linear]) -> _Layer:
        def here(norm: Tensor | None) -> Tensor | None:
            return None if norm is None else norm.to(self._device)

        return _Layer(
            weights.norm1.to(self._device),
            weights.norm2.to(self._device),
            here(weights.q_norm),
            here(weights.k_norm),
            *(prepack(part) for part in (weights.qkv, weights.o, weights.up, weights.down)),
        )

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Tensor:
        return self._logits(spans).cpu()

    def _logits(self, spans: Sequence[Span]) -> Tensor:
        """`forward` on the device."""
        config = self._config
        tokens = torch.tensor([t for span in spans for t in span.tokens], device=self._device)
        x = embedding(tokens, self._embedding).to(self._dtype) * config.embedding_scale
        rotation = self._rotation(spans)
        for index, layer in enumerate(self._layers):
            mixed = self._attention(index, layer, self._normed(x, layer.norm1), rotation, spans)
            x = x + layer.o.matmul(mixed) * config.residual_scale
            gate, up = layer.up.matmul(self._normed(x, layer.norm2)).chunk(2, dim=-1)
            x = x + layer.down.matmul(silu(gate) * up) * config.residual_scale
        ends = torch.tensor([len(span.tokens) for span in spans]).cumsum(0) - 1
        wanted = ends[[i for i, span in enumerate(spans) if span.logits]]
        rows = self._normed(x[wanted.to(self._device)], self._norm)
        return self._head.matmul(rows).float() * config.logit_scale

    def reusable(self, slot: int, held: int, shared: int, length: int) -> int:
        return self._config.rope.reusable(held, shared, length)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._config.eps)
        return (weight * (wide * scale)).to(self._dtype)

    def _rotation(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """cos and sin [tokens, 1, rotary_dim / 2]."""
        rope, angles = self._config.rope, []
        for span in spans:
            table = self._rope[bool(rope.original and span.length > rope.original)]
            positions = torch.arange(
                span.start, span.start + len(span.tokens), dtype=torch.float32, device=self._device
            )
            angles.append(positions[:, None] * table)
        angle = torch.cat(angles).unsqueeze(1)
        return angle.cos() * rope.factor, angle.sin() * rope.factor

    def _attention(
        self,
        index: int,
        layer: _Layer,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        spans: Sequence[Span],
    ) -> Tensor:
        config = self._config
        heads = layer.qkv.matmul(x).view(len(x), -1, config.head_dim)
        q, k, v = torch.split(heads, [config.heads, config.kv_heads, config.kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._normed(q, layer.q_norm), self._normed(k, layer.k_norm)
        if config.rotated[index]:
            q, k = _rotated(q, *rotation), _rotated(k, *rotation)
        mixed, first = torch.empty_like(q), 0
        for span in spans:
            part, end = slice(first, first + len(span.tokens)), span.start + len(span.tokens)
            keys, values = self._cache[index, :, span.slot]
            keys[:, span.start : end] = k[part].transpose(0, 1)
            values[:, span.start : end] = v[part].transpose(0, 1)
            mixed[part] = scaled_dot_product_attention(
                q[part].transpose(0, 1).unsqueeze(0),
                keys[None, :, :end],
                values[None, :, :end],
                attn_mask=_mask(span.start, end, config.windows[index], self._device),
                scale=config.attention_scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
            first = part.stop
        return mixed.reshape(len(x), -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [tokens, heads, head_dim] by halves (Su et al., RoFormer; NeoX's order)."""
    half = cos.shape[-1]
    wide = x.float()
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(turned, dim=-1).to(x.dtype)


def _mask(start: int, end: int, window: int, device: torch.device) -> Tensor:
    """Which keys [0, end) each token of start..end sees; bool [tokens, end]."""
    token = torch.arange(start, end, device=device)[:, None]
    key = torch.arange(end, device=device)
    seen = key <= token
    return seen & (key > token - window) if window else seen
