"""GGUF: files of other writers, options, names, hyper-parameters, and what the proof covers."""

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qexport.errors import CheckpointError, InputError, RefusedError
from qexport.formats import FORMATS, Options, open_checkpoint
from qexport.formats.gguf.blocks import BLOCKS
from qexport.formats.gguf.container import GgufFile, Value, plan_file
from qexport.formats.gguf.hparams import config_of, hparams, rope_tensors
from qexport.formats.gguf.names import Rows, from_gguf, to_gguf
from qexport.formats.gguf.vocabulary import vocabulary
from qexport.formats.pack import pack
from qexport.formats.verify import verify
from qexport.runtime.loader import open_model
from tests.conftest import Cli, Runs
from tests.formats.gguf_files import KNOWN, TEXTS, foreign_file, header_only
from tests.formats.models import decoder_layer

GGUF = FORMATS["gguf"]


@pytest.mark.parametrize("kind", KNOWN)
def test_files_of_gguf_py_are_read_to_the_bit(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "theirs.gguf"
    expected = foreign_file(
        path, tiny_model, {"all": kind, "embed": "Q8_0", "mlp.down_proj": "F16"}
    )
    source = open_checkpoint(path)
    assert set(source) == set(expected)
    assert source.config["num_attention_heads"] == 4
    assert source.config["tie_word_embeddings"] is True
    for name, values in expected.items():
        tensor = source[name]
        mine = tensor.float() if isinstance(tensor, torch.Tensor) else tensor.dequantize()
        assert np.array_equal(mine.numpy().view(np.uint32), values.view(np.uint32)), name
    natural = BLOCKS[kind].natural
    assert (natural is not None) == bool(source.modules)
    zeros = {"Q3_K", "Q6_K", "IQ4_NL"}  # random factors of sub-blocks, or scales: some are 0
    if kind in zeros:
        with pytest.raises(RefusedError, match="groups of scale zero"):
            pack(source, FORMATS["native"], tmp_path / "native")
    elif natural is not None:
        report = pack(source, FORMATS["native"], tmp_path / "native")
        assert report.exact
        assert verify(source, open_checkpoint(tmp_path / "native")).exact


def test_a_lone_file_generates(cli: Cli, runs: Runs, tmp_path: Path) -> None:
    """Tokenizer, template and config all come out of the one file."""
    run = runs("4")
    assert cli("pack", run, "--format", "gguf", "-o", tmp_path / "out").returncode == 0
    lone = tmp_path / "lone.gguf"
    shutil.copyfile(tmp_path / "out" / "model.gguf", lone)
    model, tokenizer, _ = open_model(lone, "float32")
    twin, theirs, _ = open_model(run, "float32")
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == theirs.decode(theirs.encode(text))
    messages = [{"role": "user", "content": "hi"}]
    kwargs: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(messages, **kwargs) == theirs.apply_chat_template(
        messages, **kwargs
    )
    ids = torch.tensor([tokenizer.encode("Hello there")])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)
    result = cli("generate", lone, "-p", "Hello", "--max-tokens", "4", "--temperature", "0")
    assert result.returncode == 0, result.stderr
    assert cli("verify", run, tmp_path / "out").returncode == 0
    repacked = cli("pack", lone, "--format", "gptq", "-o", tmp_path / "gptq")
    assert repacked.returncode == 0, repacked.stderr
    assert open_model(tmp_path / "gptq", "float32")[1].encode("Hello") == theirs.encode("Hello")
    assert cli("pack", lone, "--format", "gguf", "-o", tmp_path / "again").returncode == 0


def test_metadata_is_verified_too(runs: Runs, tmp_path: Path) -> None:
    source = open_checkpoint(runs("4"))
    pack(source, GGUF, tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    data = path.read_bytes()
    swapped = data.replace(b"<|assistant|>", b"<|assailant|>")
    assert swapped != data
    path.write_bytes(swapped)
    report = verify(source, open_checkpoint(tmp_path / "out"))
    assert "tokenizer.chat_template" in report.differing_files
    assert not report.exact
    theta = struct.pack("<f", 10000.0)
    path.write_bytes(data.replace(theta, struct.pack("<f", 500000.0), 1))
    with pytest.raises(CheckpointError, match=r"differ in llama.rope.freq_base"):
        open_checkpoint(tmp_path / "out")


def test_schemes_that_the_blocks_do_not_bear_out_are_damage(runs: Runs, tmp_path: Path) -> None:
    pack(open_checkpoint(runs("4", 64)), GGUF, tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    file = GgufFile(path)
    info = file.tensors["blk.0.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[info.offset + 18 : info.offset + 20] = b"\x00\x3c"  # the second block of a group of 64
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not on the grid int4 g64"):
        open_checkpoint(tmp_path / "out").quantized("model.layers.0.mlp.up_proj.weight")


# --- options ----------------------------------------------------------------------------------


def test_a_type_may_be_named(tiny_model: Path, tmp_path: Path) -> None:
    source = decoder_layer(tiny_model, "ternary", 256, None)
    for block in ("TQ1_0", "TQ2_0", "Q2_0", "Q4_0"):
        report = pack(source, GGUF, tmp_path / block, Options(block=block))
        assert report.exact
        assert report.bits_per_weight == BLOCKS[block].bits_per_weight
    assert pack(source, GGUF, tmp_path / "four", Options(bits=4)).verdicts[0]["stored"] == "Q4_0"
    with pytest.raises(RefusedError, match="at Q1_0 has no block type that holds ternary"):
        pack(source, GGUF, tmp_path / "out", Options(block="Q1_0"))
    with pytest.raises(InputError, match="--type Q9_9 is no block type of gguf; it has Q1_0"):
        pack(source, GGUF, tmp_path / "out", Options(block="Q9_9"))
    with pytest.raises(InputError, match="only gguf has them"):
        pack(source, FORMATS["gptq"], tmp_path / "out", Options(block="Q4_0"))


def test_a_minimum_that_is_exact_gives_the_grid_back(tiny_model: Path, tmp_path: Path) -> None:
    """Q4_1 keeps the symmetric grid to the bit, and is read as it; only zero points are rounded."""
    source = decoder_layer(tiny_model, "int4", 256, 64)
    assert pack(source, GGUF, tmp_path / "out", Options(block="Q4_1")).exact
    back = open_checkpoint(tmp_path / "out")
    assert back.modules == source.modules
    assert pack(back, FORMATS["native"], tmp_path / "native").exact


def test_narrow_layers_fall_back_and_say_so(tiny_model: Path, tmp_path: Path) -> None:
    source = decoder_layer(tiny_model, "seq2", 192, None)
    report = pack(source, GGUF, tmp_path / "out")
    assert report.held == [
        "seq2 as int4 codes at half the step in Q4_0, exact, 4.5 bits per weight"
    ]
    with pytest.raises(RefusedError, match="Q2_K wants groups of a multiple of 256 inputs"):
        pack(source, GGUF, tmp_path / "two", Options(block="Q2_K"))


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q6_k"])
def test_embeddings_by_option(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    source = decoder_layer(tiny_model, "int4", 256, 64)
    if kind != "f16":
        with pytest.raises(RefusedError, match="rounds them; --allow-lossy lets it"):
            pack(source, GGUF, tmp_path / "out", Options(embeddings=kind))
    options = Options(embeddings=kind, allow_lossy=kind != "f16")
    report = pack(source, GGUF, tmp_path / "out", options)
    assert report.verification.values_exact
    lossy = [] if kind == "f16" else ["model.embed_tokens.weight"]
    assert report.verification.differing_dense == lossy
    kept = open_checkpoint(tmp_path / "out").dense("model.embed_tokens.weight")
    mine = source.dense("model.embed_tokens.weight").float()
    assert float((kept.float() - mine).norm() / mine.norm()) < {"f16": 1e-9}.get(kind, 0.02)


def test_families_without_a_name_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    source = decoder_layer(tiny_model, "int4", 256, 64)
    source.config["model_type"] = "phi3"
    with pytest.raises(RefusedError, match="families llama, mistral, qwen2, qwen3, minicpm"):
        pack(source, GGUF, tmp_path / "out")


# --- names and hyper-parameters -------------------------------------------------------------------


def test_names_go_there_and_back() -> None:
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += ["model.layers.11.self_attn.q_proj.bias", "model.layers.0.mlp.down_proj.weight"]
    for name in names:
        theirs = to_gguf(name)
        assert theirs is not None
        assert from_gguf(theirs) == name
    assert to_gguf("model.layers.0.mlp.experts.3.w1.weight") is None
    assert from_gguf("blk.٣.attn_q.weight") is None


def test_rows_are_ordered_as_llama_cpp_does() -> None:
    """Row i of the first half and row i of the second become neighbours, within each head."""
    rows = Rows(heads=2, kv_heads=1)
    q = torch.arange(16).float().view(16, 1)
    there = rows.to_file("model.layers.0.self_attn.q_proj.weight", q)
    assert isinstance(there, torch.Tensor)
    assert there.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert rows.from_file("model.layers.0.self_attn.q_proj.weight", there).equal(q)  # type: ignore[union-attr]
    assert rows.to_file("model.layers.0.self_attn.v_proj.weight", q) is q


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "vocab_size": 260,
}


@pytest.mark.parametrize(
    "extra",
    [
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_theta": 500000.0,
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        {"model_type": "qwen3"},
        {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32},
        {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 0},
    ],
)
def test_hyper_parameters_go_there_and_back(tmp_path: Path, extra: dict[str, Any]) -> None:
    config = {**LLAMA, **extra}
    arch = config["model_type"]
    metadata = {"general.architecture": Value("str", arch), **hparams(config)}
    tensors = {"token_embd.weight": torch.zeros(260, 64), **rope_tensors(config)}
    back = config_of(header_only(tmp_path / "a.gguf", metadata, tensors))
    for key in LLAMA:
        assert back[key] == pytest.approx(config[key])
    assert {k: v.encode() for k, v in hparams(back).items()} == {
        k: v.encode() for k, v in hparams(config).items()
    }
    again = rope_tensors(back)
    assert set(again) == set(rope_tensors(config))
    for name, factors in again.items():
        assert torch.allclose(factors, rope_tensors(config)[name])


def test_unknown_rotary_scaling_is_refused() -> None:
    with pytest.raises(RefusedError, match="no rotary scaling of type 'dynamic'"):
        hparams({**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})


# --- what the proof covers ------------------------------------------------------------------------


def rewritten(path: Path, extra: dict[str, Value]) -> None:
    """The file again with more metadata, tensors and their places as they were."""
    file = GgufFile(path)
    names = list(file.tensors)
    ends = sorted([*(i.offset for i in file.tensors.values()), path.stat().st_size])
    sizes = {
        n: ends[ends.index(file.tensors[n].offset) + 1] - file.tensors[n].offset for n in names
    }
    held = {n: bytes(file.data(n, sizes[n])) for n in names}

    class Raw(Value):
        def encode(self) -> bytes:
            data: bytes = self.value
            return data

    metadata = {**{key: Raw("raw", file.raw(key)) for key in file}, **extra}
    infos = {n: (file.tensors[n].type, file.tensors[n].shape, sizes[n]) for n in names}
    plan = plan_file(path.name, metadata, infos)
    data = bytearray(plan.header) + bytes(plan.size - len(plan.header))
    for name, (start, size) in plan.slots.items():
        data[start : start + size] = held[name]
    path.write_bytes(data)


def test_metadata_that_was_added_is_found(runs: Runs, tmp_path: Path) -> None:
    source = open_checkpoint(runs("4"))
    pack(source, GGUF, tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    rewritten(path, {})
    assert verify(source, open_checkpoint(tmp_path / "out")).exact
    rewritten(path, {"tokenizer.ggml.add_sep_token": Value("bool", True)})
    report = verify(source, open_checkpoint(tmp_path / "out"))
    assert report.differing_files == ["tokenizer.ggml.add_sep_token"]
    rewritten(path, {"llama.rope.scaling.factor": Value("f32", 8.0)})
    with pytest.raises(CheckpointError, match=r"differ in llama.rope.scaling.factor"):
        open_checkpoint(tmp_path / "out")


def test_rotary_factors_are_verified(tiny_model: Path, tmp_path: Path) -> None:
    source = decoder_layer(tiny_model, "int4", 64, 32)
    source.config["rope_parameters"] = {
        "rope_theta": 10000.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    pack(source, GGUF, tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    assert verify(source, open_checkpoint(tmp_path / "out")).exact
    place = GgufFile(path).tensors["rope_freqs.weight"].offset
    data = bytearray(path.read_bytes())
    data[place : place + 4] = struct.pack("<f", 3.0)
    path.write_bytes(data)
    report = verify(source, open_checkpoint(tmp_path / "out"))
    assert report.differing_files == ["rope_freqs.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "computes silu here"),
        ({"use_sliding_window": True}, "no sliding window here"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "parameter mscale"),
        ({"tie_word_embeddings": False}, "there is no lm_head.weight"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(
    tiny_model: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    source = decoder_layer(tiny_model, "int4", 64, 32)
    source.config.update(change)
    if "rope_scaling" in change:
        source.config.pop("rope_parameters", None)
    with pytest.raises(RefusedError, match=said):
        pack(source, GGUF, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_ids_that_only_the_config_names(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny_model / "tokenizer.json", tmp_path / "tokenizer.json")
    assert "tokenizer.ggml.eos_token_id" not in vocabulary(tmp_path, 260)
    (tmp_path / "config.json").write_text('{"eos_token_id": [256, 7]}')
    assert vocabulary(tmp_path, 260)["tokenizer.ggml.eos_token_id"].value == 256
