"""The folders that the pages speak of, with tiny random models in them."""

import json
from pathlib import Path

from qexport.source import open_source
from qexport.tiny import write_tiny_model
from tests.shard_writer import ShardWriter

__all__ = ["write_paretoq", "write_world"]

# wide enough for groups of 128 and for K-quants; every page begins with a copy of its own
_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_LARGE = {
    "Llama-3.1-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Llama-3.1-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
_MINICPM = {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 128}


def write_world(folder: Path) -> Path:
    """A dense model, a MiniCPM, and a ParetoQ checkpoint, under the names that pages give them."""
    model = write_tiny_model(folder / "SmolLM2-135M", **_SHAPE)
    mini = write_tiny_model(folder / "MiniCPM4-0.5B", **_SHAPE)
    config = json.loads((mini / "config.json").read_text())
    (mini / "config.json").write_text(json.dumps({**config, **_MINICPM}))
    write_paretoq(model, folder / "paretoq-2bit")
    for name, shape in _LARGE.items():  # `plan` reads no more than this
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**_LLAMA, **shape}))
    return folder


def write_paretoq(model: Path, folder: Path) -> None:
    """Latent bfloat16 weights and weight_clip_val, as facebookresearch/ParetoQ saves them."""
    source = open_source(model)
    assert source is not None
    folder.mkdir()
    writer = ShardWriter(folder)
    for name in source:
        tensor = source.dense(name)
        writer.add(name, tensor)
        if name.endswith("_proj.weight"):
            writer.add(f"{name.removesuffix('weight')}weight_clip_val", tensor.abs().amax(-1, True))
    writer.close()
    (folder / "config.json").write_text(json.dumps({**source.config, "w_bits": 2}))
    source.copy_files(folder)
