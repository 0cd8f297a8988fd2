"""Our files in a real vLLM, against the dense twin with the same weights in the same vLLM."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qexport.data import documents
from qexport.formats import FORMATS, Options, open_checkpoint
from qexport.formats.pack import pack
from qexport.modelling import load_tokenizer
from qexport.tiny import write_tiny_model
from qexport.train import TrainConfig, train
from tests.oracle.install import FOLDER
from tests.oracle.models import dense_twin, rounded, smollm2

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / ".ready").exists(), reason="no .venv-oracle here; `make oracle` makes it"
    ),
]
SCRIPT = Path(__file__).parent / "vllm_logprobs.py"


def vllm(checkpoint: Path, prompts: list[list[int]], scratch: Path, tokens: int = 1) -> Any:
    """Scores and greedy tokens of prompts from vLLM in a process of its own."""
    scratch.mkdir()
    (scratch / "prompts.json").write_text(json.dumps(prompts))
    files = [str(checkpoint), str(scratch / "prompts.json"), str(scratch / "out.json")]
    for _ in range(2):  # the engine's own aborts (seen at its exit) are not what is tested
        result = subprocess.run(
            [str(FOLDER / "bin" / "python"), str(SCRIPT), *files, str(tokens)],
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        if (scratch / "out.json").exists():
            break
    assert (scratch / "out.json").exists(), result.stderr[-4000:]
    return json.loads((scratch / "out.json").read_text())


def test_seq_2_bit_embedded_in_4_bit_gptq(tmp_path: Path) -> None:
    """The half-integer grid, trained at 2 bits, in an unmodified vLLM that only serves 4."""
    model = write_tiny_model(
        tmp_path / "model",
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )
    run = tmp_path / "run"
    settings = TrainConfig(
        model, "builtin", run, "2", 64, max_steps=30, max_length=128, lr=3e-3, precision="fp32"
    )
    train(settings, Console(quiet=True))
    source = open_checkpoint(run)
    report = pack(source, FORMATS["gptq"], tmp_path / "gptq", Options(bits=4))
    assert report.exact
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 250, (4, 64), generator=generator).tolist()
    served = torch.tensor(vllm(tmp_path / "gptq", prompts, tmp_path / "a")["scores"])
    twin = dense_twin(source, tmp_path / "twin")
    expected = torch.tensor(vllm(twin, prompts, tmp_path / "b")["scores"])
    difference = (served - expected).abs()
    # vLLM's CPU kernel rounds differently from its dense matmul; a wrong zero or scale gives > 1.
    assert float(difference.mean()) < 0.05
    assert float(difference.max()) < 0.5
    assert float(expected.std()) > 0.3  # the model has learned something to disagree on


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """20 held-out texts of 48 tokens."""
    tokenizer = load_tokenizer(smollm2())
    prose = " ".join(" ".join(text.split()) for text in documents("builtin", "eval", tokenizer))
    ids = tokenizer.encode(prose)
    return [ids[start : start + 48] for start in range(0, 20 * 150, 150)]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]]) -> Any:
    """What vLLM says of SmolLM2 rounded to int4 g64, as a dense checkpoint."""
    scratch = tmp_path_factory.mktemp("twin")
    folder = dense_twin(rounded(smollm2(), "int4", 64), scratch / "dense")
    return vllm(folder, texts, scratch / "run", 16)


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_smollm2_in_vllm(tmp_path: Path, texts: list[list[int]], twin: Any, form: str) -> None:
    source = rounded(smollm2(), "int4", 64)
    assert pack(source, FORMATS[form], tmp_path / "out").exact
    served = vllm(tmp_path / "out", texts, tmp_path / "run", 16)
    difference = (torch.tensor(served["scores"]) - torch.tensor(twin["scores"])).abs()
    same = sum(a == b for a, b in zip(served["greedy"], twin["greedy"], strict=True))
    print(f"{form}: mean difference {float(difference.mean()):.4f}, greedy equal {same} of 20")
    assert float(difference.mean()) <= 0.05
    assert same >= 18
