"""GGUF: blocks against gguf-py, files of other writers, tokenizers, and damage."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qexport.errors import CheckpointError, InputError, RefusedError
from qexport.formats import FORMATS, Options, open_checkpoint
from qexport.formats.gguf.block import Block
from qexport.formats.gguf.blocks import BLOCKS
from qexport.formats.gguf.container import GgufFile, Value, plan_file
from qexport.formats.gguf.hparams import config_of, hparams, rope_tensors
from qexport.formats.gguf.names import Rows, from_gguf, to_gguf
from qexport.formats.gguf.rounding import round_to_q6_k, round_to_q8_0
from qexport.formats.gguf.vocabulary import tokenizer_of, vocabulary
from qexport.formats.pack import pack
from qexport.formats.verify import verify
from qexport.runtime.loader import open_model
from tests.conftest import Cli, Runs
from tests.formats import decoders as second
from tests.formats.models import decoder_layer

GGUF = FORMATS["gguf"]
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
    bad = ~decoded.dequantize().isfinite().view(rows, per_row, -1).all(-1).numpy()
    raw[bad] = 0
    return raw


@pytest.mark.parametrize("name", KNOWN)
def test_blocks_are_read_as_gguf_py_reads_them(name: str) -> None:
    raw = random_blocks(BLOCKS[name], 16, 8, 1)
    mine = BLOCKS[name].decode(torch.from_numpy(raw)).dequantize().numpy()
    theirs = dequantize(raw.reshape(16, -1), gguf.GGMLQuantizationType[name])
    assert np.array_equal(mine.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize(
    ("name", "decode"), [("Q1_0", second.ggml_q1_0), ("Q2_0", second.ggml_q2_0)]
)
def test_blocks_that_gguf_py_lacks(name: str, decode: Callable[..., Any]) -> None:
    raw = random_blocks(BLOCKS[name], 4, 8, 2)
    mine = BLOCKS[name].decode(torch.from_numpy(raw)).dequantize().numpy()
    theirs = decode(raw.reshape(-1, BLOCKS[name].bytes)).reshape(4, -1)
    assert np.array_equal(mine.view(np.uint32), theirs.view(np.uint32))


def test_golden_blocks() -> None:
    """Literal bytes, so that encoder and decoder cannot drift together."""
    half = bytes([0x00, 0x38])  # float16 0.5
    one = torch.ones(1, 1, dtype=torch.float16) / 2
    ternary = torch.tensor([0, 1, 2, 1] * 16, dtype=torch.uint8).view(1, 1, 64)
    block = BLOCKS["Q2_0"]
    assert bytes(block.encode(block.holds[0], ternary, one, None).flatten().tolist()) == (
        half + bytes([0b01100100] * 16)
    )
    signs = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1] * 16, dtype=torch.uint8).view(1, 1, 128)
    block = BLOCKS["Q1_0"]
    assert bytes(block.encode(block.holds[0], signs, one * 2, None).flatten().tolist()) == (
        half + bytes([0b10000001] * 16)
    )
    seq = torch.arange(256).div(64, rounding_mode="floor").to(torch.uint8).view(1, 1, 256)
    block = BLOCKS["Q2_K"]
    raw = bytes(block.encode(block.holds[0], seq, one * 2, None).flatten().tolist())
    # planes of 32 in each half: codes 0 0 1 1, then 2 2 3 3, lowest plane in the lowest bits
    assert raw == bytes([0x32] * 16 + [0b01010000] * 32 + [0b11111010] * 32) + half + half


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(BLOCKS)), st.integers(0, 2**32 - 1))
def test_blocks_give_back_every_code(name: str, seed: int) -> None:
    block = BLOCKS[name]
    generator = torch.Generator().manual_seed(seed)
    for grid in block.holds:
        if grid.minima:
            continue  # see tests/quantize/test_kquant.py
        codes = torch.randint(0, grid.levels, (2, 3, block.size), generator=generator).byte()
        scales = (torch.rand(2, 3, generator=generator) + 0.01).bfloat16().half()
        zeros = None
        if grid.zeros:
            zeros = torch.randint(0, grid.levels, (2, 3), generator=generator).byte()
        decoded = block.decode(block.encode(grid, codes, scales, zeros))
        middle = grid.middle if zeros is None else zeros.float().unsqueeze(-1)
        units = codes.float() - middle
        if grid.values is not None:
            units = torch.tensor(grid.values)[codes.int()]
        expected = units * scales.float().unsqueeze(-1)
        assert torch.equal(decoded.codes, codes.view(2, -1))
        assert torch.equal(decoded.dequantize(), expected.view(2, -1))


@pytest.mark.parametrize(("round_to", "name"), [(round_to_q8_0, "Q8_0"), (round_to_q6_k, "Q6_K")])
def test_rounded_embeddings_are_near(round_to: Callable[..., torch.Tensor], name: str) -> None:
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    raw = round_to(weight)
    theirs = dequantize(raw.flatten(1).numpy(), gguf.GGMLQuantizationType[name])
    error = np.abs(theirs - weight.numpy()).max()
    assert error < weight.abs().max() / {"Q8_0": 200, "Q6_K": 50}[name]


# --- files of others ------------------------------------------------------------------------


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


# --- tokenizers ---------------------------------------------------------------------------------


def trained(pre: str) -> Tokenizer:
    """A small BPE tokenizer of each kind, trained on the texts above and this file."""
    corpus = [*TEXTS, Path(__file__).read_text()]
    if pre == "spm":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
        special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator([w for text in corpus for w in text.split("\n")], trainer)
        saved = json.loads(tokenizer.to_str())
        saved["added_tokens"] = saved["added_tokens"][:3]
        return Tokenizer.from_str(json.dumps(saved))
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    elif pre == "gpt-2":
        tokenizer.pre_tokenizer = level
    else:
        numbers = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
            + numbers
            + r"| ?[^\s\p{L}\p{N}]"
            r"+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "spm"])
def test_tokenizers_go_there_and_back(tmp_path: Path, pre: str) -> None:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if pre != "spm":
        names = {"eos_token": "<|end|>"}
    PreTrainedTokenizerFast(tokenizer_object=trained(pre), **names).save_pretrained(tmp_path)
    mine = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    values = vocabulary(tmp_path, 640)
    assert values["tokenizer.ggml.pre"].value == ("default" if pre == "spm" else pre)
    assert len(values["tokenizer.ggml.tokens"].value) == 640
    back = tokenizer_of(header_only(tmp_path / "a.gguf", values, {"x": torch.zeros(1)}))
    for text in [*TEXTS, *Path(__file__).read_text().splitlines()[:200]]:
        assert back.encode(text) == mine.encode(text).ids, text
        assert back.decode(back.encode(text)) == mine.decode(mine.encode(text).ids, False)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "Unigram", "vocab": []}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(
    tiny_model: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    spec = {**json.loads((tiny_model / "tokenizer.json").read_text()), **change}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(RefusedError, match=r"llama.cpp has no tokenizer like this one"):
        vocabulary(tmp_path, 260)


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


def test_one_block_alone_is_read(tmp_path: Path) -> None:
    for block in BLOCKS.values():
        raw = random_blocks(block, 1, 1, 5)
        assert block.decode(torch.from_numpy(raw)).codes.shape == (1, block.size)
