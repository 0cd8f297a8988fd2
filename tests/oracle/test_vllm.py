"""Our GPTQ files in a real vLLM, against the dense twin with the same weights in the same vLLM."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qexport.formats import FORMATS, Options, open_checkpoint
from qexport.formats.pack import pack
from qexport.shards import ShardWriter
from qexport.tensor import QuantizedTensor
from qexport.tiny import write_tiny_model
from qexport.train import TrainConfig, train
from tests.oracle.install import FOLDER

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / ".ready").exists(), reason="no .venv-oracle here; `make oracle` makes it"
    ),
]
SCRIPT = Path(__file__).parent / "vllm_logprobs.py"


def vllm_scores(checkpoint: Path, prompts: list[list[int]], scratch: Path) -> torch.Tensor:
    """Log-probabilities [prompts, tokens - 1] from vLLM in a process of its own."""
    scratch.mkdir()
    (scratch / "prompts.json").write_text(json.dumps(prompts))
    files = [str(checkpoint), str(scratch / "prompts.json"), str(scratch / "out.json")]
    for _ in range(2):  # the engine's own aborts (seen at its exit) are not what is tested
        result = subprocess.run(
            [str(FOLDER / "bin" / "python"), str(SCRIPT), *files],
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        if (scratch / "out.json").exists():
            break
    assert (scratch / "out.json").exists(), result.stderr[-4000:]
    return torch.tensor(json.loads((scratch / "out.json").read_text()))


def dense_twin(run: Path, folder: Path) -> Path:
    """The run's dequantized weights as an ordinary bfloat16 checkpoint."""
    folder.mkdir()
    source = open_checkpoint(run)
    writer = ShardWriter(folder)
    for name in source:
        tensor = source[name]
        if isinstance(tensor, QuantizedTensor):
            tensor = tensor.dequantize(torch.bfloat16)
        writer.add(name, tensor)
    writer.close()
    source.copy_files(folder)
    (folder / "config.json").write_text(json.dumps(source.config))
    return folder


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
    report = pack(open_checkpoint(run), FORMATS["gptq"], tmp_path / "gptq", Options(bits=4))
    assert report.exact
    assert isinstance(open_checkpoint(run)["model.layers.0.mlp.up_proj.weight"], QuantizedTensor)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 250, (4, 64), generator=generator).tolist()
    served = vllm_scores(tmp_path / "gptq", prompts, tmp_path / "a")
    twin = vllm_scores(dense_twin(run, tmp_path / "twin"), prompts, tmp_path / "b")
    difference = (served - twin).abs()
    # vLLM's CPU kernel rounds differently from its dense matmul; a wrong zero or scale gives > 1.
    assert float(difference.mean()) < 0.05
    assert float(difference.max()) < 0.5
    assert float(twin.std()) > 0.3  # the model has learned something to disagree on
