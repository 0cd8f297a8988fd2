"""GGUF files and texts for tests."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize

from qexport.formats.gguf.block import Block
from qexport.formats.gguf.blocks import BLOCKS
from qexport.formats.gguf.container import GgufFile, Value, plan_file
from qexport.formats.gguf.names import to_gguf
from qexport.formats.gguf.vocabulary import vocabulary

KNOWN = sorted(set(BLOCKS) & {t.name for t in gguf.GGMLQuantizationType} - {"Q1_0"})
TEXTS = [
    "The quick brown fox, 12345 times; isn't it?",
    "  leading and   inner    runs\t\tof \n\n\n whitespace \r\n ",
    "日本語のテキストと中文字符 한국어 العربية",
    "emoji 🎉🎉 👩‍👩‍👧‍👦 é é ß ﬁ",
    "",
    " ",
    "x=1;y+=2//3 <|user|>hi<|end|>",
]


def random_blocks(block: Block, rows: int, per_row: int, seed: int) -> np.ndarray[Any, Any]:
    """Random bytes whose float16 fields are finite, as rows of a tensor."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, per_row, block.bytes), dtype=np.uint8)
    decoded = block.decode(torch.from_numpy(raw))
    bad = ~decoded.weights().isfinite().view(rows, per_row, -1).all(-1).numpy()
    raw[bad] = 0
    return raw


def foreign_file(path: Path, tiny_model: Path, kinds: dict[str, str]) -> dict[str, Any]:
    """A Llama of width 256 as gguf-py writes it, linear layers quantized; values by our names."""
    config = json.loads((tiny_model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for key, value in vocabulary(tiny_model, 260).items():
        adders = {"str": writer.add_string, "u32": writer.add_uint32, "bool": writer.add_bool}
        adders.get(value.kind, writer.add_array)(key, value.value)
    expected = {}
    rng = np.random.default_rng(0)

    def add(name: str, shape: tuple[int, ...], kind: str) -> None:
        theirs = to_gguf(name)
        assert theirs is not None
        if kind == "F32":
            values = rng.standard_normal(shape).astype(np.float32)
            writer.add_tensor(theirs, values)
        elif kind == "F16":
            values = rng.standard_normal(shape).astype(np.float16)
            writer.add_tensor(theirs, values)
        else:
            number = gguf.GGMLQuantizationType[kind]
            try:
                raw = quantize(rng.standard_normal(shape).astype(np.float32), number)
            except NotImplementedError:
                block = BLOCKS[kind]
                raw = random_blocks(block, shape[0], shape[1] // block.size, 3)
                raw = raw.reshape(shape[0], -1)
            writer.add_tensor(theirs, raw, raw_dtype=number)
            values = dequantize(raw, number)
        expected[name] = np.asarray(values, np.float32)

    add("model.embed_tokens.weight", (260, 256), kinds.get("embed", "F16"))
    layer = "model.layers.0"
    names = [f"self_attn.{n}_proj" for n in "qkvo"]
    for name in [*names, *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]:
        add(f"{layer}.{name}.weight", (256, 256), kinds.get(name, kinds["all"]))
    for name in ("input_layernorm", "post_attention_layernorm"):
        add(f"{layer}.{name}.weight", (256,), "F32")
    add("model.norm.weight", (256,), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, values in expected.items():  # q and k stand permuted in the file
        if ".q_proj" in name or ".k_proj" in name:
            pairs = values.reshape(4, 32, 2, -1)
            expected[name] = np.swapaxes(pairs, 1, 2).reshape(256, 256)
    return expected


def header_only(path: Path, metadata: dict[str, Value], tensors: dict[str, Any]) -> GgufFile:
    plan = plan_file(
        path.name, metadata, {n: (0, t.shape, 4 * t.numel()) for n, t in tensors.items()}
    )
    data = bytearray(plan.header) + bytes(plan.size - len(plan.header))
    for name, tensor in tensors.items():
        start, size = plan.slots[name]
        data[start : start + size] = tensor.numpy().tobytes()
    path.write_bytes(data)
    return GgufFile(path)
