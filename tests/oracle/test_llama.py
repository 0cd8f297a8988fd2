"""Our GGUF files in a real llama.cpp: its tokens, and its logits against our float32 reference."""

import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from qexport.checkpoint import Checkpoint
from qexport.data import documents
from qexport.formats import FORMATS, Options, open_checkpoint
from qexport.formats.pack import pack
from qexport.modelling import load_tokenizer
from qexport.runtime.loader import load_model
from qexport.tiny import write_tiny_model
from tests.oracle.install import FOLDER
from tests.oracle.models import rounded, smollm2

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / ".ready").exists(), reason="no .venv-oracle here; `make oracle` makes it"
    ),
]
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


def assert_agrees(source: Checkpoint, packed: Path, ids: list[list[int]], scratch: Path) -> None:
    """llama.cpp quantizes activations to 8 bits; a wrong scale or row order gives KL above 1."""
    _, theirs = llama(packed / "model.gguf", [], ids, scratch)
    ours = reference(source, ids)
    assert len(ours) >= POSITIONS
    top = (theirs.argmax(-1) == ours.argmax(-1)).float().mean()
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
    print(f"top-1 {float(top):.4f}, KL {float(divergence):.5f}, {len(ours)} positions")
    assert float(top) >= 0.95
    assert float(divergence) < 0.01


def prose(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    text = " ".join(next(iter(documents("builtin", "eval", tokenizer))).split())
    return [tokenizer.encode(text)[:POSITIONS]]


@pytest.mark.parametrize(
    ("grid", "block"), [("int4", "Q4_0"), ("seq2", "Q4_0"), ("ternary", "Q2_0"), ("int8", "Q8_0")]
)
def test_smollm2_in_llama_cpp(tmp_path: Path, grid: str, block: str) -> None:
    source = rounded(smollm2(), grid, 64)
    report = pack(source, FORMATS["gguf"], tmp_path / "out")
    assert report.exact
    assert {verdict["stored"] for verdict in report.verdicts} == {block}
    assert_agrees(source, tmp_path / "out", prose(source.folder), tmp_path)


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ("seq2", "Q2_K"),
        ("int3", "Q3_K"),
        ("ternary", "TQ1_0"),
        ("ternary", "TQ2_0"),
        ("int4", "Q4_1"),
        ("int4", "Q5_K"),
        ("int4", "Q6_K"),
    ],
)
def test_wide_types_in_llama_cpp(tmp_path: Path, grid: str, block: str) -> None:
    """A model of widths that 256 divides, with head rows to permute and an untied head."""
    model = write_tiny_model(
        tmp_path / "model",
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    source = rounded(model, grid, None)
    report = pack(source, FORMATS["gguf"], tmp_path / "out", Options(block=block))
    assert report.exact
    ids = torch.randint(0, 256, (2, POSITIONS), generator=torch.Generator().manual_seed(0))
    assert_agrees(source, tmp_path / "out", ids.tolist(), tmp_path)


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


def test_embeddings_rounded_for_llama_cpp(tmp_path: Path) -> None:
    """The largest tensor of a small model at 8 bits: what is in the file is what is computed."""
    source = rounded(smollm2(), "int4", 64)
    options = Options(embeddings="q8_0", allow_lossy=True)
    report = pack(source, FORMATS["gguf"], tmp_path / "out", options)
    assert report.verification.differing_dense == ["model.embed_tokens.weight"]
    packed = open_checkpoint(tmp_path / "out")
    assert_agrees(packed, tmp_path / "out", prose(source.folder), tmp_path)
