"""Our GGUF files in a real llama.cpp: its tokens, and its logits against our float32 reference."""

import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from qexport.checkpoint import Checkpoint, Entry
from qexport.data import documents
from qexport.formats import FORMATS, Options, open_checkpoint
from qexport.formats.pack import pack
from qexport.modelling import load_tokenizer
from qexport.quantization import QuantizeConfig, quantize_model
from qexport.runtime.loader import load_model
from qexport.tensor import QuantizedTensor
from qexport.tiny import write_tiny_model
from qexport.training import TrainConfig, train
from tests.oracle.install import FOLDER
from tests.oracle.marks import REAL_MODELS
from tests.oracle.models import rounded, smollm2

pytestmark = REAL_MODELS
SCRIPT = Path(__file__).parent / "llama_scores.py"
POSITIONS = 64


def llama(
    path: Path, texts: list[str], ids: list[list[int]], scratch: Path
) -> tuple[list[list[int]], torch.Tensor]:
    """Tokens of `texts`, and log-probabilities [positions, vocabulary] of all `ids`."""
    job = scratch / "job.json"
    job.write_text(json.dumps({"texts": texts, "ids": ids}))
    command = [FOLDER / "bin" / "python", SCRIPT, path, job, scratch / "out"]
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    with np.load(scratch / "out.npz") as found:
        logits = torch.cat([torch.from_numpy(found[f"arr_{i}"]) for i in range(len(ids))])
    return json.loads((scratch / "out.json").read_text()), logits.log_softmax(-1)


def reference(checkpoint: Checkpoint, ids: list[list[int]]) -> torch.Tensor:
    model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        return torch.cat([model(torch.tensor([one])).logits[0] for one in ids]).log_softmax(-1)


def assert_agrees(
    source: Checkpoint,
    packed: Path,
    ids: list[list[int]],
    scratch: Path,
    least_top: float = 0.95,
) -> None:
    """llama.cpp quantizes activations to 8 bits; a wrong scale or row order gives KL above 1."""
    _, theirs = llama(packed / "model.gguf", [], ids, scratch)
    ours = reference(source, ids)
    assert len(ours) >= POSITIONS
    top = (theirs.argmax(-1) == ours.argmax(-1)).float().mean()
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
    print(f"top-1 {float(top):.4f}, KL {float(divergence):.5f}, {len(ours)} positions")
    assert float(top) >= least_top
    assert float(divergence) < 0.01


def prose(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    texts = (" ".join(text.split()) for text in documents("builtin", "eval", tokenizer))
    return [tokenizer.encode(" ".join(texts))[: 4 * POSITIONS]]


def test_smollm2_int4_in_llama_cpp(four_bits: Checkpoint, tmp_path: Path) -> None:
    in_llama_cpp(four_bits, "Q4_0", tmp_path)


def test_smollm2_seq2_in_llama_cpp(tmp_path: Path) -> None:
    """SEQ's grid by GPTQ: after a few steps of training alone, words are about as likely."""
    config = QuantizeConfig(
        smollm2(),
        tmp_path / "run",
        "gptq",
        "2",
        group_size=64,
        calibration="builtin",
        samples=16,
        length=256,
    )
    quantize_model(config, Console(quiet=True))
    in_llama_cpp(open_checkpoint(config.output), "Q4_0", tmp_path)


def test_smollm2_int8_in_llama_cpp(tmp_path: Path) -> None:
    in_llama_cpp(rounded(smollm2(), "int8", 64), "Q8_0", tmp_path)


def in_llama_cpp(source: Checkpoint, block: str, scratch: Path) -> None:
    report = pack(source, FORMATS["gguf"], scratch / "out")
    assert report.exact
    assert {verdict["stored"] for verdict in report.verdicts} == {block}
    assert_agrees(source, scratch / "out", prose(source.folder), scratch)


@pytest.mark.parametrize(
    ("bits", "blocks", "target"),
    [
        ("1", ["Q1_0"], None),
        ("1.58", ["TQ1_0", "TQ2_0", "Q2_0"], None),
        ("2", ["Q2_K"], None),
        ("3", ["Q3_K"], None),
        ("4", ["Q4_1", "Q5_K", "Q6_K"], None),
        ("2", ["Q2_K"], "gguf:Q2_K"),
        ("3", ["Q3_K"], "gguf:Q3_K"),
    ],
)
def test_wide_types_in_llama_cpp(
    tmp_path: Path, bits: str, blocks: list[str], target: str | None
) -> None:
    """A model of widths that 256 divides, trained at its width, with a head of its own.

    Per channel; or with the scales of 16 weights that a block has, where it is trained for that.
    """
    model = write_tiny_model(
        tmp_path / "model",
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        tie_word_embeddings=False,
    )
    settings = TrainConfig(
        model,
        "builtin",
        tmp_path / "run",
        bits,
        None,
        max_steps=30,
        max_length=128,
        lr=3e-3,
        precision="fp32",
        target=target,
    )
    train(settings, Console(quiet=True))
    source = open_checkpoint(tmp_path / "run")
    for block in blocks:
        report = pack(source, FORMATS["gguf"], tmp_path / block, Options(block=block))
        assert report.exact
        ids = [one[: 2 * POSITIONS] for one in prose(source.folder)]
        assert_agrees(source, tmp_path / block, ids, tmp_path)


def strings(count: int) -> list[str]:
    """Words, numbers, punctuation, emoji, CJK and runs of white space, mixed."""
    rng = random.Random(0)
    pieces = ["hello", " World", "don't", " I'll", "12345", " 3.14", "日本語", "中文字符", "한국어"]
    pieces += ["🎉", "👩‍👩‍👧‍👦", "é", "ﬁ", "ß", "   ", "\t\t", "\n\n", " \n ", "\r\n", "!?", "://"]
    pieces += ["عربى", "Привет", "_x", "==", "{}", "<|im_start|>", "<|im_end|>", "\u00a0", "\u3000"]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(count)]


def test_tokens_are_the_same(tmp_path: Path) -> None:
    folder = smollm2()
    pack(rounded(folder, "int4", 64), FORMATS["gguf"], tmp_path / "out")
    texts = strings(1000)
    theirs, _ = llama(tmp_path / "out" / "model.gguf", texts, [[1]], tmp_path)
    tokenizer = load_tokenizer(folder)
    ours = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert [t for t, a, b in zip(texts, ours, theirs, strict=True) if a != b] == []


def test_embeddings_rounded_for_llama_cpp(four_bits: Checkpoint, tmp_path: Path) -> None:
    """The largest tensor of a small model at 8 bits: what is in the file is what is computed."""
    options = Options(embeddings="q8_0", allow_lossy=True)
    report = pack(four_bits, FORMATS["gguf"], tmp_path / "out", options)
    assert report.verification.differing_dense == ["model.embed_tokens.weight"]
    packed = open_checkpoint(tmp_path / "out")
    assert_agrees(packed, tmp_path / "out", prose(packed.folder), tmp_path)


def family(folder: Path, kind: str) -> Path:
    """A random model of another family with the tiny model's tokenizer; attention matters in it."""
    import transformers

    shape = {
        "vocab_size": 260,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.12,
        "tie_word_embeddings": kind != "Llama",
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }
    llama3 = {
        "rope_theta": 10000.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    extra = {"Llama": {"attention_bias": True, "rope_parameters": llama3}}
    write_tiny_model(folder)
    config = getattr(transformers, f"{kind}Config")(**{**shape, **extra.get(kind, {})})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # not the ones and zeros of a new model
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_families_in_llama_cpp(tmp_path: Path, kind: str) -> None:
    """Biases, norms of heads, rotary factors and the order of rows, family by family."""
    source = rounded(family(tmp_path / "model", kind), "int8", 32)
    pack(source, FORMATS["gguf"], tmp_path / "out")
    ids = [one[: 2 * POSITIONS] for one in prose(source.folder)]
    # a random model's answers lie close together: divergence is what tells
    assert_agrees(source, tmp_path / "out", ids, tmp_path, least_top=0.9)
    lone = tmp_path / "lone.gguf"
    (tmp_path / "out" / "model.gguf").rename(lone)
    ours, again = reference(source, ids), reference(open_checkpoint(lone), ids)
    assert torch.equal(ours, again)


def test_minicpm_in_llama_cpp(tmp_path: Path) -> None:
    """transformers has no MiniCPM; it is a Llama with embeddings, residuals and logits scaled."""
    plain = rounded(family(tmp_path / "model", "Mistral"), "int8", 32)
    head = Entry((260, 128), torch.bfloat16, lambda: plain.dense("model.embed_tokens.weight"))
    entries = {**plain.entries, "lm_head.weight": head}
    config = {**plain.config, "tie_word_embeddings": False}
    scales = {"scale_emb": 2.0, "scale_depth": 0.5 * 2**0.5, "dim_model_base": 64}
    minicpm = {**config, **scales, "model_type": "minicpm"}
    source = Checkpoint(plain.folder, "run", minicpm, entries)
    pack(source, FORMATS["gguf"], tmp_path / "out")
    ids = [one[: 2 * POSITIONS] for one in prose(source.folder)]
    llama_like = Checkpoint(
        plain.folder, "run", config, {n: folded(n, e) for n, e in entries.items()}
    )
    assert_agrees(llama_like, tmp_path / "out", ids, tmp_path, least_top=0.9)


def folded(name: str, entry: Entry) -> Entry:
    """MiniCPM's scales of the test above, folded into a Llama's weights."""

    def load() -> torch.Tensor | QuantizedTensor:
        tensor = entry.load()
        if isinstance(tensor, QuantizedTensor):
            if not name.endswith(("o_proj.weight", "down_proj.weight")):
                return tensor
            return QuantizedTensor(tensor.codes, tensor.scales / 2, tensor.scheme)
        factors = {"model.embed_tokens.weight": 2.0, "lm_head.weight": 0.5}
        return tensor * factors.get(name, 1.0)

    return Entry(entry.shape, entry.dtype, load, entry.scheme, entry.stored_bytes)
