"""Weights of a decoder as its checkpoint has them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint
from qexport.errors import CheckpointError
from qexport.grid import INT4, INT8, Scheme
from qexport.runtime.families import DecoderConfig
from qexport.tensor import QuantizedTensor, portable, quantize

__all__ = [
    "LayerWeights",
    "Weight",
    "joined",
    "read_dense",
    "read_embedding",
    "read_head",
    "read_layer",
]

_ROWS = 4096  # of a head that are rounded at a time
_DENSE = (torch.float32, torch.bfloat16, torch.float16)

Weight = tuple[QuantizedTensor | Tensor, Tensor | None]  # [out, in], and a bias [out]


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

    def together(parts: dict[str, int], inputs: int) -> list[Weight]:
        left.difference_update(f"{prefix}{n}.{kind}" for n in parts for kind in ("weight", "bias"))
        return joined([_weight(checkpoint, prefix + n, (o, inputs)) for n, o in parts.items()])

    read = LayerWeights(
        norm1=norm("input_layernorm", hidden),
        norm2=norm("post_attention_layernorm", hidden),
        q_norm=head_norm("self_attn.q_norm"),
        k_norm=head_norm("self_attn.k_norm"),
        qkv=together(
            {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys},
            hidden,
        ),
        o=together({"self_attn.o_proj": hidden}, queries),
        up=together({"mlp.gate_proj": inter, "mlp.up_proj": inter}, hidden),
        down=together({"mlp.down_proj": hidden}, inter),
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
    name = "model.embed_tokens" if config.tied else "lm_head"
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


def joined(weights: list[Weight]) -> list[Weight]:
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
    return QuantizedTensor.of_rows(parts)
