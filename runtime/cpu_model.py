"""The decoder in C++: one call a step, of which every layer is fused operations on float32."""

import ctypes
from collections.abc import Sequence
from ctypes import byref

import numpy as np
import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint
from qexport.errors import UnsupportedError
from qexport.runtime.families import DecoderConfig
from qexport.runtime.kernels.cpu import CpuKernel, CpuLinear
from qexport.runtime.kernels.cpu_library import (
    DTYPES,
    Context,
    CpuLayer,
    CpuLinearStruct,
    CpuModel,
    CpuStep,
    library,
    pointer,
)
from qexport.runtime.model import Decoder, Span
from qexport.runtime.weights import (
    LayerWeights,
    Weight,
    read_dense,
    read_embedding,
    read_head,
    read_layer,
)
from qexport.tensor import QuantizedTensor

__all__ = ["CpuDecoder"]

_LARGEST_HEAD = 256  # what attention's buffers hold
_MOST_SHARED = 64  # query heads of one key-value head
_LANES = 16


class CpuDecoder(Decoder):
    """A decoder whose steps are one call into `runtime/csrc/cpu`.

    exact       activations stay float32; otherwise int8 in groups, into every quantized layer
    cache       dtype of keys and values: float32, float16, bfloat16 or int8 (a scale per head)
    threads     default: torch's number
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        *,
        slots: int,
        context: int,
        cache: torch.dtype = torch.float16,
        exact: bool = False,
        head_bits: int | None = None,
        threads: int | None = None,
    ) -> None:
        reason = self.refuses(config)
        if reason is not None:
            raise UnsupportedError(f"the CPU decoder does not take this model: {reason}.")
        self.slots, self.vocabulary = slots, config.vocabulary
        self.context, self._places = context, -(-context // _LANES) * _LANES
        self._config, self._exact = config, exact
        self._kernel = CpuKernel(exact)
        self._keep: list[Tensor | CpuLinear] = []
        self._caches: list[Tensor] = []
        self._rooms: dict[str, Tensor] = {}
        self._passed_over: set[str] = set()
        self._threads = Context(threads)
        self._layers = self._read_layers(checkpoint, cache)
        self._model = self._describe(cache)
        self._embedding = read_embedding(checkpoint, config)
        self._norm = read_dense(checkpoint, "model.norm.weight", (config.hidden,)).float()
        self._head = self._linear(*read_head(checkpoint, config, head_bits))
        found = library()
        assert found is not None
        self._library = found
        isa = found.qx_isa().decode()
        others = "".join(f"; dense float32 where {reason}" for reason in sorted(self._passed_over))
        self.kernels = f"{self._kernel.name} ({isa}, {self._threads.threads} threads){others}"

    @staticmethod
    def refuses(config: DecoderConfig) -> str | None:
        """Why a model is not for this decoder; None where it is."""
        if library() is None:
            return "its kernels were not compiled; install qexport where there is a C++ compiler"
        if config.head_dim > _LARGEST_HEAD:
            return f"heads of {config.head_dim} are larger than {_LARGEST_HEAD}"
        if config.heads // config.kv_heads > _MOST_SHARED:
            return f"more than {_MOST_SHARED} heads share keys"
        return None

    def reusable(self, slot: int, held: int, shared: int, length: int) -> int:
        return self._config.rope.reusable(held, shared, length)

    def _read_layers(self, checkpoint: Checkpoint, cache: torch.dtype) -> ctypes.Array[CpuLayer]:
        config = self._config
        read: dict[int, CpuLayer] = {}
        layers = (CpuLayer * config.layers)()
        for index, source in enumerate(config.weights):
            if source not in read:
                read[source] = self._layer(read_layer(checkpoint, config, source))
            layer = layers[index]
            ctypes.memmove(byref(layer), byref(read[source]), ctypes.sizeof(CpuLayer))
            layer.window, layer.rope = config.windows[index], config.rotated[index]
            self._add_cache(layer, cache)
        return layers

    def _layer(self, weights: LayerWeights) -> CpuLayer:
        layer = CpuLayer()
        layer.norm1, layer.norm2 = self._pointer(weights.norm1), self._pointer(weights.norm2)
        if weights.q_norm is not None and weights.k_norm is not None:
            layer.q_norm, layer.k_norm = map(self._pointer, (weights.q_norm, weights.k_norm))
        layer.n_qkv, layer.n_up = len(weights.qkv), len(weights.up)
        for i, part in enumerate(weights.qkv):
            layer.qkv[i] = self._struct(part)
        for i, part in enumerate(weights.up):
            layer.up[i] = self._struct(part)
        layer.o, layer.down = self._struct(weights.o[0]), self._struct(weights.down[0])
        return layer

    def _struct(self, weight: Weight) -> CpuLinearStruct:
        linear = self._linear(*weight)
        self._keep.append(linear)
        return linear.struct

    def _linear(self, weight: QuantizedTensor | Tensor, bias: Tensor | None) -> CpuLinear:
        if isinstance(weight, QuantizedTensor):
            reason = self._kernel.refuses(weight.scheme, weight.shape, weight.codes.device)
            if reason is None:
                return self._kernel.prepack(weight, bias)
            self._passed_over.add(reason)
            weight = weight.dequantize()
        return CpuLinear.dense(weight, bias)

    def _add_cache(self, layer: CpuLayer, dtype: torch.dtype) -> None:
        """Memory that the system hands out, as zeros, only where it is touched."""
        config, wide = self._config, -(-self._config.head_dim // _LANES) * _LANES
        lines = self.slots * config.kv_heads * self._places
        layer.keys = self._zeros(lines * config.head_dim * dtype.itemsize)
        layer.values = self._zeros(lines * wide * dtype.itemsize)
        if dtype == torch.int8:
            layer.key_scales, layer.value_scales = self._zeros(lines * 4), self._zeros(lines * 4)

    def _zeros(self, size: int) -> ctypes.c_void_p:
        self._caches.append(torch.from_numpy(np.zeros(size, dtype=np.uint8)))
        return pointer(self._caches[-1])

    def reserve(self) -> int:
        return sum(cache.zero_().nbytes for cache in self._caches)

    def _pointer(self, tensor: Tensor) -> ctypes.c_void_p:
        self._keep.append(tensor)
        return pointer(tensor)

    def _describe(self, cache: torch.dtype) -> CpuModel:
        config = self._config
        return CpuModel(
            hidden=config.hidden,
            inter=config.inter,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            rotary_dim=2 * len(config.rope.short),
            context=self._places,
            cache_dtype=DTYPES[cache],
            exact=self._exact,
            n_layers=config.layers,
            eps=config.eps,
            residual_scale=config.residual_scale,
            attention_scale=config.attention_scale,
            layers=self._layers,
        )

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Tensor:
        config = self._config
        tokens = np.array([token for span in spans for token in span.tokens], np.int32)
        x = self._room("x", len(tokens), config.hidden)
        # torch's own threads are not woken anywhere in a step: they would spin beside ours
        self._library.qx_embed(
            *(pointer(self._embedding), DTYPES[self._embedding.dtype], tokens.ctypes.data),
            *(len(tokens), config.hidden, config.embedding_scale, pointer(x)),
        )
        slots = np.repeat(
            np.array([span.slot for span in spans], np.int32), [len(span.tokens) for span in spans]
        )
        positions = np.concatenate(
            [np.arange(span.start, span.start + len(span.tokens), dtype=np.int32) for span in spans]
        )
        cos, sin = self._rotation(spans, positions)
        step = CpuStep(len(tokens), *(a.ctypes.data for a in (slots, positions, cos, sin)))
        self._library.qx_model_forward(
            self._threads.handle, byref(self._model), byref(step), pointer(x)
        )
        ends = np.cumsum([len(span.tokens) for span in spans]) - 1
        wanted = [end for end, span in zip(ends, spans, strict=True) if span.logits]
        return self._logits(x if len(wanted) == len(x) else x[wanted])

    def _room(self, name: str, rows: int, wide: int) -> Tensor:
        """float32 [rows, wide], the same memory every time.

        Given back and asked for anew at each step, blocks of these sizes made malloc's heap grow
        for minutes.
        """
        room = self._rooms.get(name)
        if room is None or len(room) < rows:
            room = torch.empty(rows, wide, dtype=torch.float32, device="cpu")
            self._rooms[name] = room
        return room[:rows]

    def _rotation(self, spans: Sequence[Span], positions: np.ndarray) -> tuple[np.ndarray, ...]:
        rope = self._config.rope
        tables = rope.short.numpy(), rope.long.numpy()
        frequencies = tables[0]
        if rope.original:
            chosen = [tables[span.length > rope.original] for span in spans for _ in span.tokens]
            frequencies = np.stack(chosen)
        angle = positions.astype(np.float32)[:, None] * frequencies
        factor = np.float32(rope.factor)
        return np.cos(angle) * factor, np.sin(angle) * factor

    def _logits(self, x: Tensor) -> Tensor:
        config, count = self._config, len(x)
        out = self._room("logits", count, self.vocabulary)
        if not count:
            return out
        normed = self._room("normed", count, config.hidden)
        self._library.qx_rms_norm(
            *(self._threads.handle, pointer(x), pointer(self._norm), config.eps),
            *(count, config.hidden, pointer(normed)),
        )
        self._library.qx_linear_forward(
            *(self._threads.handle, byref(self._head.struct), pointer(normed), count),
            *(pointer(out), self.vocabulary, self._exact, False, 1.0),
        )
        return out if config.logit_scale == 1.0 else out.mul_(config.logit_scale)
