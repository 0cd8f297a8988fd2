"""Names of tensors in Hugging Face checkpoints and in GGUF, and the order of rotary rows.

llama.cpp rotates neighbouring pairs of rows of q and k in the llama and minicpm families, where
transformers rotates row i with row i + half. Their files keep the rows in the order that suits
them, so that q and k are permuted on the way, scales and zero points with the codes.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.errors import CheckpointError
from qexport.tensor import QuantizedTensor

__all__ = ["FAMILIES", "Family", "Rows", "from_gguf", "to_gguf"]


@dataclass(frozen=True)
class Family:
    """A model family: `arch` is llama.cpp's word, `model_type` and `model_class` transformers'.

    biases  endings of the modules whose bias llama.cpp reads
    """

    arch: str
    model_type: str
    model_class: str
    permuted: bool
    biases: tuple[str, ...] = ()


_QKV = ("q_proj", "k_proj", "v_proj")
# By model_type; the first of an arch is what a GGUF file of it is read as.
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "llama", "LlamaForCausalLM", True, ("_proj",)),
        Family("llama", "mistral", "MistralForCausalLM", True),
        Family("qwen2", "qwen2", "Qwen2ForCausalLM", False, _QKV),
        Family("qwen3", "qwen3", "Qwen3ForCausalLM", False),
        Family("minicpm", "minicpm", "MiniCPMForCausalLM", True),
    )
}

_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER_BACK = {theirs: ours for ours, theirs in _OUTER.items()}
_INNER_BACK = {theirs: ours for ours, theirs in _INNER.items()}
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.(.+)", re.ASCII)
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)", re.ASCII)


def to_gguf(name: str) -> str | None:
    """`blk.0.attn_q.weight` for `model.layers.0.self_attn.q_proj.weight`; None for others."""
    return _renamed(name, _LAYER, "blk", _INNER, _OUTER)


def from_gguf(name: str) -> str | None:
    """Undo `to_gguf`."""
    return _renamed(name, _BLOCK, "model.layers", _INNER_BACK, _OUTER_BACK)


def _renamed(
    name: str, layer: re.Pattern[str], prefix: str, inner: dict[str, str], outer: dict[str, str]
) -> str | None:
    module, _, leaf = name.rpartition(".")
    match = layer.fullmatch(module)
    found = inner.get(match[2]) if match else outer.get(module)
    if found is None or leaf not in ("weight", "bias"):
        return None
    return f"{prefix}.{match[1]}.{found}.{leaf}" if match else f"{found}.{leaf}"


@dataclass(frozen=True)
class Rows:
    """The order of rows of a model's q and k. `heads` is 0 where nothing is permuted."""

    heads: int = 0
    kv_heads: int = 0

    def to_file(self, name: str, tensor: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
        """A tensor of a Hugging Face checkpoint as llama.cpp wants it."""
        return self._reorder(name, tensor, False)

    def from_file(self, name: str, tensor: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
        """Undo `to_file`. `name` is the Hugging Face name in both."""
        return self._reorder(name, tensor, True)

    def _reorder(
        self, name: str, tensor: Tensor | QuantizedTensor, back: bool
    ) -> Tensor | QuantizedTensor:
        heads = self._heads(name)
        if not heads:
            return tensor
        if tensor.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{name} has {tensor.shape[0]} rows, which {heads} heads do not divide in halves."
            )
        rows = torch.arange(tensor.shape[0]).view(heads, -1)
        sides = (-1, 2) if back else (2, -1)
        order = rows.view(heads, *sides).transpose(1, 2).reshape(-1)
        if isinstance(tensor, Tensor):
            return tensor[order]
        return tensor.rows(order)

    def _heads(self, name: str) -> int:
        if ".q_proj." in name:
            return self.heads
        return self.kv_heads if ".k_proj." in name else 0
