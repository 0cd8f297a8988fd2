"""Files made to do harm: each is refused with an error of ours, by every reader it concerns."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qexport.hf  # noqa: F401  # registers the native format
from qexport.errors import CheckpointError
from qexport.formats import FORMATS, Options, detect, open_checkpoint
from qexport.formats.gguf.container import GgufFile
from qexport.formats.pack import pack
from tests.conftest import Runs
from tests.formats.gguf_files import foreign_file
from tests.formats.models import decoder_layer, taken_by
from tests.fuzz import fuzz

SAFETENSORS = sorted(set(FORMATS) - {"gguf"})


def gguf_bytes(
    pairs: bytes = b"", pair_count: int = 0, infos: bytes = b"", info_count: int = 0, data: int = 64
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, info_count, pair_count) + pairs + infos
    return head + bytes(-len(head) % 32 + data)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def info(name: str, sides: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(sides))
    return head + struct.pack(f"<{len(sides)}Q", *sides) + struct.pack("<IQ", kind, offset)


ALIGNMENT = "general.alignment"
GGUF_ATTACKS = {
    "zero alignment": gguf_bytes(pair(ALIGNMENT, 4, struct.pack("<I", 0)), 1),
    "odd alignment": gguf_bytes(pair(ALIGNMENT, 4, struct.pack("<I", 33)), 1),
    "alignment as text": gguf_bytes(pair(ALIGNMENT, 8, struct.pack("<Q", 1) + b"x"), 1),
    "a product of sides that wraps to 0": gguf_bytes(infos=info("t", (2**32, 2**32)), info_count=1),
    "a product that wraps to little": gguf_bytes(
        infos=info("t", (2**33, 2**31 + 1, 1, 1)), info_count=1
    ),
    "a side of 0": gguf_bytes(infos=info("t", (0, 4)), info_count=1),
    "no dimensions": gguf_bytes(infos=info("t", ()), info_count=1),
    "a thousand dimensions": gguf_bytes(infos=info("t", (1,) * 1000), info_count=1),
    "a string past the end": gguf_bytes(pair("k", 8, struct.pack("<Q", 2**63)), 1),
    "a key past the end": gguf_bytes(struct.pack("<Q", 2**64 - 1), 1),
    "an array past the end": gguf_bytes(pair("k", 9, struct.pack("<IQ", 4, 2**62)), 1),
    "an array of strings past the end": gguf_bytes(pair("k", 9, struct.pack("<IQ", 8, 2**61)), 1),
    "an array of arrays": gguf_bytes(pair("k", 9, struct.pack("<IQ", 9, 1)), 1),
    "a value of no type": gguf_bytes(pair("k", 99, b""), 1),
    "a key twice": gguf_bytes(pair("k", 4, bytes(4)) * 2, 2),
    "a tensor twice": gguf_bytes(infos=info("t", (4,)) * 2, info_count=2),
    "an offset past the end": gguf_bytes(infos=info("t", (4,), 0, 2**40), info_count=1),
    "an offset that wraps": gguf_bytes(infos=info("t", (4,), 0, 2**64 - 32), info_count=1),
    "an offset not aligned": gguf_bytes(infos=info("t", (4,), 0, 4), info_count=1),
    "too many pairs": gguf_bytes(pair_count=2**40),
    "too many tensors": gguf_bytes(info_count=2**63),
    "a name that is no text": gguf_bytes(infos=struct.pack("<Q", 2) + b"\xff\xfe", info_count=1),
    "an older version": b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(64),
    "nothing": b"GGUF",
}


@pytest.mark.parametrize("name", sorted(GGUF_ATTACKS))
def test_gguf_headers(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(GGUF_ATTACKS[name])
    assert detect(path) is FORMATS["gguf"]
    with pytest.raises(CheckpointError, match=r"bad.gguf is no sound GGUF file"):
        open_checkpoint(path)


def test_a_tensor_that_ends_after_its_file(tiny_model: Path, tmp_path: Path) -> None:
    pack(decoder_layer(tiny_model, "int4", 64, 32), FORMATS["gguf"], tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"the file ends before|outside of it"):
        checkpoint = open_checkpoint(tmp_path / "out")
        for name in checkpoint:
            checkpoint[name]


def test_many_short_strings_take_little_memory(tmp_path: Path) -> None:
    """A string costs eight bytes in a file and fifty in Python: they are made when asked for."""
    count = 3 << 20
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_bytes(pair("k", 9, struct.pack("<IQ", 8, count) + bytes(8 * count)), 1))
    with pytest.raises(CheckpointError, match="claims 3145728 strings"):
        GgufFile(path)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 65520.0 * 2])
def test_gguf_scales_that_are_not_finite(tiny_model: Path, tmp_path: Path, scale: float) -> None:
    pack(decoder_layer(tiny_model, "int4", 64, 32), FORMATS["gguf"], tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    place = GgufFile(path).tensors["blk.0.ffn_up.weight"].offset
    data = bytearray(path.read_bytes())
    data[place : place + 2] = torch.tensor([scale]).half().view(torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="a scale that is not finite"):
        open_checkpoint(tmp_path / "out").quantized("model.layers.0.mlp.up_proj.weight")


def packed(tiny_model: Path, folder: Path, form: str) -> Path:
    grid, group = taken_by(form)
    pack(decoder_layer(tiny_model, grid, 64, group), FORMATS[form], folder, Options())
    return folder


def change(folder: Path, **tensors: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Rewrite tensors of the first module by the end of their names."""
    path = folder / "model.safetensors"
    held = load_file(path)
    for ending, make in tensors.items():
        name = f"model.layers.0.mlp.down_proj.{ending}"
        held[name] = make(held[name]).contiguous()
    save_file(held, path)


def parts(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of the first module by the end of their names."""
    held, module = load_file(folder / "model.safetensors"), "model.layers.0.mlp.down_proj."
    return {n.removeprefix(module): t for n, t in held.items() if n.startswith(module)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("form", SAFETENSORS)
def test_scales_that_are_nothing(tiny_model: Path, tmp_path: Path, form: str, value: float) -> None:
    folder = packed(tiny_model, tmp_path / "out", form)
    (named,) = (name for name in parts(folder) if re.search(r"scales?$|\.absmax$", name))
    change(folder, **{named: lambda t: torch.cat((t[:-1], torch.full_like(t[-1:], value)))})
    with pytest.raises(CheckpointError, match="a scale that is zero or not finite"):
        open_checkpoint(folder).quantized("model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("index", [-1, 2, 2**31 - 1])
def test_group_indices_out_of_range(tiny_model: Path, tmp_path: Path, index: int) -> None:
    folder = packed(tiny_model, tmp_path / "out", "gptq")
    change(folder, g_idx=lambda t: torch.cat((t[:-1], t.new_full((1,), index))))
    with pytest.raises(CheckpointError, match="reordered groups"):
        open_checkpoint(folder).quantized("model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("shape", [[2**31, 2**31], [-1, 64], [0, 64], [64, 65], [64, 2**40]])
def test_shapes_that_the_tensors_do_not_have(
    tiny_model: Path, tmp_path: Path, shape: list[int]
) -> None:
    folder = packed(tiny_model, tmp_path / "out", "compressed-tensors")
    change(folder, weight_shape=lambda _: torch.tensor(shape))
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


# int-quantized has no other word for a shape than the weight's own; the model's config has.
@pytest.mark.parametrize("form", sorted(set(SAFETENSORS) - {"int-quantized"}))
def test_tensors_cut_short(tiny_model: Path, tmp_path: Path, form: str) -> None:
    folder = packed(tiny_model, tmp_path / "out", form)
    held = parts(folder)
    named = max(held, key=lambda name: held[name].nbytes)  # the codes
    change(folder, **{named: lambda t: t[:-1] if t.shape[1] == 1 else t[:, :-1]})
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


def test_patterns_that_take_for_ever(tiny_model: Path, tmp_path: Path) -> None:
    folder = packed(tiny_model, tmp_path / "out", "compressed-tensors")
    config = json.loads((folder / "config.json").read_text())
    patterns = ["(a+)+$", "((a|aa)*)*b", "(.*a){20}", "[", "a" * 600, "(model.*)*x", "(a|aa)+$"]
    patterns += ["a?" * 30 + "a" * 30, "(.*|a)b", "(a)(b)"]
    for pattern in patterns:
        (group,) = config["quantization_config"]["config_groups"].values()
        group["targets"] = [f"re:{pattern}"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="target pattern"):
            open_checkpoint(folder)


@pytest.mark.parametrize("where", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_shards_outside_the_folder(tiny_model: Path, tmp_path: Path, where: str) -> None:
    folder = packed(tiny_model, tmp_path / "out", "native")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index: dict[str, Any] = {"metadata": {}, "weight_map": {"model.norm.weight": where}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(folder)


def test_symlinked_shards(tiny_model: Path, tmp_path: Path) -> None:
    """A link within a hub cache is usual; one to what is no checkpoint is just unreadable."""
    folder = packed(tiny_model, tmp_path / "out", "native")
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    assert open_checkpoint(folder).modules
    weights.unlink()
    weights.symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="is damaged: its header"):
        open_checkpoint(folder)
    weights.unlink()
    weights.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    weights.unlink()
    weights.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


def test_mutated_checkpoints() -> None:
    """A slice of the fuzzer's inputs; `make fuzz` runs 200,000."""
    outcomes, findings, longest = fuzz(1, 0, 3000, lambda _: None)
    assert findings == []
    assert longest < 2
    assert outcomes["CheckpointError"] > 1000
    assert outcomes["opened"] > 500


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        (".*" * 200 + "Z", False),
        (".*q_proj", True),
        (".*self_attn\\.(q|k|v)_proj$", True),
        ("^model.layers.0.*", True),
        (".*(gate|up)_proj$", False),
        ("q_proj", False),
        ("model.*q_pro$", False),
        ("modelxlayers", False),
        ("model.layers", True),
        ("model\\.layers", True),
        ("model-.layers", False),
    ],
)
def test_patterns_that_are_usual(pattern: str, fits: bool) -> None:
    from qexport.formats.compressed_tensors import _matches

    module = "model.layers.0.self_attn.q_proj"
    assert _matches(pattern, module) is fits
    if "Z" not in pattern:
        assert (re.match(pattern, module) is not None) is fits


def test_tensors_over_one_another(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_bytes(infos=info("a", (8,)) + info("b", (8,)), info_count=2))
    with pytest.raises(CheckpointError, match="two tensors stand at one place"):
        GgufFile(path)
    path.write_bytes(
        gguf_bytes(infos=info("a", (16,)) + info("b", (8,), 0, 32), info_count=2, data=96)
    )
    with pytest.raises(CheckpointError, match="a overlaps the tensor after it"):
        GgufFile(path).data("a", 64)


@pytest.mark.parametrize("block", ["Q2_K", "Q4_1"])
def test_gguf_minima_that_are_not_finite(tiny_model: Path, tmp_path: Path, block: str) -> None:
    path = tmp_path / "theirs.gguf"
    foreign_file(path, tiny_model, {"all": block})
    name = "model.layers.0.mlp.up_proj.weight"
    assert open_checkpoint(path)[name] is not None
    at = GgufFile(path).tensors["blk.0.ffn_up.weight"].offset
    content = bytearray(path.read_bytes())
    at += {"Q2_K": 82, "Q4_1": 2}[block]  # of the first block's minimum
    content[at : at + 2] = b"\x00\x7c"  # infinity
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="has a scale that is not finite"):
        open_checkpoint(path)[name]


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq", "compressed-tensors", "native"])
def test_a_dense_twin_beside_codes(tiny_model: Path, tmp_path: Path, form: str) -> None:
    """It would stand in for codes that were tampered with, in `verify` and nowhere else."""
    folder = packed(tiny_model, tmp_path / "out", form)
    checkpoint = open_checkpoint(folder)
    name = f"{next(iter(checkpoint.modules))}.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = checkpoint.quantized(name).dequantize()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="dense and quantized"):
        open_checkpoint(folder)


def test_rules_that_are_none(tiny_model: Path, tmp_path: Path) -> None:
    folder = packed(tiny_model, tmp_path / "out", "gptq")
    config = json.loads((folder / "config.json").read_text())
    for rules in (5, True, ["x"]):
        config["quantization_config"]["dynamic"] = rules
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="dynamic is no object of rules"):
            open_checkpoint(folder)


def test_files_that_are_carried_do_not_lead_elsewhere(tiny_model: Path, tmp_path: Path) -> None:
    """A packed folder is there to be given away, and what a link leads to is not."""
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    cache = tmp_path / "models--org--name"
    model = cache / "snapshots" / "abc"
    shutil.copytree(tiny_model, model)
    (cache / "blobs").mkdir()
    (model / "tokenizer.json").rename(cache / "blobs" / "1")
    (model / "tokenizer.json").symlink_to("../../blobs/1")  # as the hub's cache has it
    assert open_checkpoint(model).carried_files()
    (model / "LICENSE-x").symlink_to(secret)
    with pytest.raises(CheckpointError, match="LICENSE-x is a link out of its folder"):
        open_checkpoint(model).carried_files()


def test_a_vocabulary_that_is_not_the_embeddings(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing as long is made of it."""
    folder = packed(tiny_model, tmp_path / "native", "native")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2**31 - 1}))
    with pytest.raises(CheckpointError, match="vocab_size is 2147483647, and there are"):
        pack(open_checkpoint(folder), FORMATS["gguf"], tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"), [({"num_bits": 4}, "int4"), ({"symmetric": False}, "uint8")]
)
def test_other_grids_held_as_int8(
    tiny_model: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    """`int-quantized` has int8 weights, whatever its config says of them."""
    source = decoder_layer(tiny_model, "int8", 64, None)
    pack(source, FORMATS["int-quantized"], tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"is {said} held as int8"):
        open_checkpoint(tmp_path / "out")


def test_zero_points_beyond_the_grid(tiny_model: Path, tmp_path: Path) -> None:
    source = decoder_layer(tiny_model, "uint4", 64, 32)
    pack(source, FORMATS["native"], tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".zeros"))
    tensors[name][1, 1] = 16
    save_file(tensors, path)
    module = name.removesuffix(".zeros")
    with pytest.raises(CheckpointError, match="holds zero point 16, and uint4 has 16 levels"):
        open_checkpoint(tmp_path / "out").quantized(f"{module}.weight")


def test_transformers_is_given_no_code_beyond_the_grid(runs: Runs, tmp_path: Path) -> None:
    pack(open_checkpoint(runs("1.58")), FORMATS["native"], tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".qweight"))
    tensors[name][0, 0] |= 3
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="holds code 3, and ternary has 3 levels"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)


def test_a_format_without_embeddings(tiny_model: Path, tmp_path: Path) -> None:
    source = decoder_layer(tiny_model, "int4", 64, 32)
    del source.entries["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"has no model\.embed_tokens\.weight"):
        pack(source, FORMATS["gguf"], tmp_path / "out")
