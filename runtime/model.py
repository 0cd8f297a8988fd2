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
from qexport.errors import CheckpointError, InputError
from qexport.grid import INT4, INT8, Scheme
from qexport.runtime.device_sampler import Draw
from qexport.runtime.families import DecoderConfig
from qexport.runtime.kernels import Linear, choose
from qexport.runtime.kernels.reference import ReferenceKernel
from qexport.tensor import QuantizedTensor, portable, quantize

__all__ = [
    "Decoder",
    "LayerWeights",
    "Span",
    "TorchDecoder",
    "Weight",
    "read_dense",
    "read_embedding",
    "read_head",
    "read_layer",
]

_ROWS = 4096  # of a head that are rounded at a time
_DENSE = (torch.float32, torch.bfloat16, torch.float16)

Weight = tuple[QuantizedTensor | Tensor, Tensor | None]  # [out, in], and a bias [out]


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


def allowed_context(asked: int, most: int) -> int:
    """The context that a user asked for. Raises InputError where the model has less."""
    if asked > most:
        raise InputError(f"the model has a context of {most}; {asked} is more than that.")
    return asked


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

        The slot holds `held` tokens, and the prompt has `length`.
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


@dataclass
class LayerWeights:
    """One layer as checkpoints have it; q, k, v and gate, up are joined where schemes agree."""

    norm1: Tensor
    norm2: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: list[Weight]
    o: list[Weight]
    up: list[Weight]
    down: list[Weight]


def read_layer(checkpoint: Checkpoint, config: DecoderConfig, layer: int) -> LayerWeights:
    """Read one layer's weights.

    Raises CheckpointError where one is missing, has another shape than the config says, or is of
    no use to this decoder.
    """
    prefix = f"model.layers.{layer}."
    hidden, inter, dim = config.hidden, config.inter, config.head_dim
    queries, keys = config.heads * dim, config.kv_heads * dim
    left = {name for name in checkpoint if name.startswith(prefix)}

    def norm(name: str, size: int) -> Tensor:
        left.discard(f"{prefix}{name}.weight")
        return read_dense(checkpoint, f"{prefix}{name}.weight", (size,)).float()

    def head_norm(name: str) -> Tensor | None:
        return norm(name, dim) if f"{prefix}{name}.weight" in checkpoint else None

    def joined(parts: dict[str, int], inputs: int) -> list[Weight]:
        left.difference_update(f"{prefix}{n}.{kind}" for n in parts for kind in ("weight", "bias"))
        return _joined([_weight(checkpoint, prefix + n, (o, inputs)) for n, o in parts.items()])

    read = LayerWeights(
        norm1=norm("input_layernorm", hidden),
        norm2=norm("post_attention_layernorm", hidden),
        q_norm=head_norm("self_attn.q_norm"),
        k_norm=head_norm("self_attn.k_norm"),
        qkv=joined(
            {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys},
            hidden,
        ),
        o=joined({"self_attn.o_proj": hidden}, queries),
        up=joined({"mlp.gate_proj": inter, "mlp.up_proj": inter}, hidden),
        down=joined({"mlp.down_proj": hidden}, inter),
    )
    unknown = sorted(name for name in left if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise CheckpointError(
            f"{checkpoint.folder} has {unknown[0]}, which a {checkpoint.config['model_type']} "
            "model has no use for; its config.json is another model's."
        )
    return read


def read_embedding(checkpoint: Checkpoint, config: DecoderConfig) -> Tensor:
    """The embeddings [vocabulary, hidden]."""
    return read_dense(checkpoint, "model.embed_tokens.weight", (config.vocabulary, config.hidden))


def read_head(checkpoint: Checkpoint, config: DecoderConfig, bits: int | None) -> Weight:
    """The matrix that makes logits; with 8 or 4 `bits` a dense one is rounded, see `_rounded`."""
    name = "model.embed_tokens" if config.tied or "lm_head.weight" not in checkpoint else "lm_head"
    weight, bias = _weight(checkpoint, name, (config.vocabulary, config.hidden))
    if bits is None or isinstance(weight, QuantizedTensor):
        return weight, bias
    return _rounded(weight, bits), bias


def _rounded(weight: Tensor, bits: int) -> QuantizedTensor:
    """A dense matrix rounded to nearest, some rows at a time.

    8 bits in groups of 64 inputs, 4 bits in groups of 32; per row where neither divides a row.
    """
    inputs = weight.shape[1]
    sizes = (64, 32) if bits == 8 else (32,)
    grid = {8: INT8, 4: INT4}[bits]
    scheme = Scheme(grid, next((size for size in sizes if inputs % size == 0), None))
    parts = []
    for rows in torch.split(weight, _ROWS):
        values = rows.float()
        largest = values.view(len(values), scheme.groups(inputs), -1).abs().amax(-1)
        parts.append(quantize(values, portable(largest / (grid.levels // 2 - 1)), scheme))
    codes = torch.cat([part.codes for part in parts])
    return QuantizedTensor(codes, torch.cat([part.scales for part in parts]), scheme)


def read_dense(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape, dequantized if it has to be. Raises CheckpointError."""
    tensor = _read(checkpoint, name, shape)
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def _weight(checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> Weight:
    bias = f"{module}.bias"
    return (
        _read(checkpoint, f"{module}.weight", shape),
        read_dense(checkpoint, bias, shape[:1]).float() if bias in checkpoint else None,
    )


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> QuantizedTensor | Tensor:
    if name not in checkpoint:
        raise CheckpointError(f"{checkpoint.folder} lacks {name}; the checkpoint is not whole.")
    tensor = checkpoint[name]
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is {tuple(tensor.shape)}, and its config.json makes it "
            f"{shape}."
        )
    if isinstance(tensor, Tensor) and tensor.dtype not in _DENSE:
        raise CheckpointError(f"{checkpoint.folder}: {name} is {tensor.dtype}, no weight's dtype.")
    return tensor


def _joined(weights: list[Weight]) -> list[Weight]:
    """One matrix of all rows where every part is dense, or quantized by the same scheme."""
    whole = _rows_of([weight for weight, _ in weights])
    if whole is None:
        return weights
    biases = [bias for _, bias in weights]
    if all(bias is None for bias in biases):
        return [(whole, None)]
    rows = [torch.zeros(weight.shape[0]) if bias is None else bias for weight, bias in weights]
    return [(whole, torch.cat(rows))]


def _rows_of(weights: list[QuantizedTensor | Tensor]) -> QuantizedTensor | Tensor | None:
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    parts = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
    if not parts and len({weight.dtype for weight in dense}) == 1:
        return torch.cat(dense)
    if dense or len({part.scheme for part in parts}) > 1:
        return None
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedTensor(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        parts[0].scheme,
        torch.cat(zeros) if zeros else None,
    )


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
