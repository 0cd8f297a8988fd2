"""Our files in a real vLLM, against the dense twin with the same weights in the same vLLM."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qexport.checkpoint import Checkpoint
from qexport.data import documents
from qexport.formats import FORMATS, Options, open_checkpoint
from qexport.formats.pack import pack
from qexport.modelling import load_tokenizer
from qexport.quantization import QuantizeConfig, quantize_model
from qexport.tiny import write_tiny_model
from qexport.training import TrainConfig, train
from tests.oracle.install import FOLDER
from tests.oracle.marks import REAL_MODELS
from tests.oracle.models import dense_twin, smollm2

pytestmark = REAL_MODELS
SCRIPT = Path(__file__).parent / "vllm_logprobs.py"
PLACES = (
    *("France", "Italy", "Spain", "Germany", "Japan", "China", "Egypt", "Russia", "Greece"),
    *("Poland", "Sweden", "Norway", "Canada", "Peru", "Cuba", "India", "Kenya", "Turkey"),
    *("Austria", "Portugal"),
)


def vllm(
    checkpoint: Path,
    prompts: list[list[int]],
    scratch: Path,
    tokens: int = 1,
    *,
    dtype: str = "bfloat16",
    int8: bool = False,
) -> Any:
    """Scores and greedy tokens of prompts from vLLM in a process of its own.

    dtype  of activations
    int8   let it round the inputs of 4-bit layers to int8 where the CPU has AMX
    """
    scratch.mkdir()
    env = {**os.environ, "VLLM_CPU_INT4_W4A8": str(int(int8))}
    (scratch / "prompts.json").write_text(json.dumps(prompts))
    files = [str(checkpoint), str(scratch / "prompts.json"), str(scratch / "out.json")]
    for _ in range(2):  # the engine's own aborts (seen at its exit) are not what is tested
        result = subprocess.run(
            [str(FOLDER / "bin" / "python"), str(SCRIPT), *files, str(tokens), dtype],
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
            env=env,
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
    # of its kernels for AMX the one for 16-bit inputs ends the process at layers of 64 outputs
    served = torch.tensor(vllm(tmp_path / "gptq", prompts, tmp_path / "a", int8=True)["scores"])
    twin = dense_twin(source, tmp_path / "twin")
    expected = torch.tensor(vllm(twin, prompts, tmp_path / "b")["scores"])
    difference = (served - expected).abs()
    # vLLM's CPU kernel rounds differently from its dense matmul; a wrong zero or scale gives > 1.
    assert float(difference.mean()) < 0.05
    assert float(difference.max()) < 0.5
    assert float(expected.std()) > 0.3  # the model has learned something to disagree on


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """20 held-out texts of 48 tokens to score, then 20 questions to answer."""
    tokenizer = load_tokenizer(smollm2())
    prose = " ".join(" ".join(text.split()) for text in documents("builtin", "eval", tokenizer))
    ids = tokenizer.encode(prose)
    texts = [ids[start : start + 48] for start in range(0, 20 * 150, 150)]
    questions = [f"What is the capital of {place}?" for place in PLACES]
    return texts + [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]


@pytest.fixture(scope="module")
def twin(
    four_bits: Checkpoint, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """What vLLM says of the dequantized weights as a dense checkpoint."""
    scratch = tmp_path_factory.mktemp("twin")
    dense = dense_twin(four_bits, scratch / "dense", torch.float16)
    return vllm(dense, prompts, scratch / "run", 16, dtype="float16")


def agreeing(served: Any, twin: Any) -> int:
    """Of the 20 questions, how many are answered alike, token for token."""
    return sum(a == b for a, b in zip(served["greedy"][20:], twin["greedy"][20:], strict=True))


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_smollm2_in_vllm(
    tmp_path: Path, four_bits: Checkpoint, prompts: list[list[int]], twin: Any, form: str
) -> None:
    """In float16, which holds the twin's weights exactly; bfloat16 would round them, too."""
    assert pack(four_bits, FORMATS[form], tmp_path / "out").exact
    served = vllm(tmp_path / "out", prompts, tmp_path / "run", 16, dtype="float16")
    mine, theirs = (torch.tensor(side["scores"][:20]) for side in (served, twin))
    difference = float((mine - theirs).abs().mean())
    same = agreeing(served, twin)
    print(f"{form}: mean difference {difference:.4f}, greedy equal {same} of 20")
    assert difference <= 0.05
    assert same >= 18


@pytest.mark.parametrize(
    ("method", "bits", "group_size", "form", "tolerance"),
    [("gptq", "4", 64, "gptq", 0.08), ("w8a8", "8", None, "int-quantized", 0.25)],
)
def test_quantized_smollm2_in_vllm(
    tmp_path: Path,
    prompts: list[list[int]],
    method: str,
    bits: str,
    group_size: int | None,
    form: str,
    tolerance: float,
) -> None:
    """What `quantize` makes; int8 activations, which w8a8 is for, round what the twin does not.

    Which answers they change depends on near ties, and so on the text it was calibrated by.
    """
    rows = documents("builtin", "calibration", load_tokenizer(smollm2()))
    text = tmp_path / "calibration.jsonl"
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = QuantizeConfig(
        smollm2(),
        tmp_path / "run",
        method,
        bits,
        group_size=group_size,
        calibration=str(text),
        samples=8,
        length=256,
    )
    quantize_model(config, Console(quiet=True))
    source = open_checkpoint(config.output)
    assert pack(source, FORMATS[form], tmp_path / "out").exact
    dense = dense_twin(source, tmp_path / "dense", torch.float16)
    served = vllm(tmp_path / "out", prompts, tmp_path / "served", 16, dtype="float16")
    twin = vllm(dense, prompts, tmp_path / "twin", 16, dtype="float16")
    mine, theirs = (torch.tensor(side["scores"][:20]) for side in (served, twin))
    difference = float((mine - theirs).abs().mean())
    same = agreeing(served, twin)
    print(f"{method}: mean difference {difference:.4f}, greedy equal {same} of 20")
    assert difference <= tolerance
    assert same >= 15
