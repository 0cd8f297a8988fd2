"""The real model: the same text as transformers' own, and no more memory than its file."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.runtime.generator import Sampling
from qexport.runtime.kernels.cpu_library import library
from qexport.runtime.loader import open_model
from qexport.runtime.serving import Serving, open_generator
from tests.oracle.models import rounded

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "In 1969, astronauts",
    "def fibonacci(n):",
    "The largest planet in the solar system",
    "Once upon a time",
    "A triangle has",
    "The Pythagorean theorem states",
    "Photosynthesis is the process",
    "Shakespeare wrote",
    "The chemical symbol for gold",
    "To bake bread you need",
    "Mount Everest is",
    "The speed of light",
    "import numpy as np\n",
    "Dogs are different from cats because",
    "The French Revolution began",
    "Q: What is 2 + 2?\nA:",
    "The human heart",
    "Dear Sir or Madam,",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(library() is None, reason="installed without a C++ compiler"),
]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Path:
    return smollm2


def test_greedy_text_is_transformers(model: Path, tmp_path: Path) -> None:
    """20 prompts x 64 tokens in exact mode, all at once on our side.

    On theirs in one pass over each answer: every token is the likeliest after those before it.
    The first answer also by their own `generate`, with a cache.
    """
    pack(rounded(model, "int4", 64), FORMATS["native"], tmp_path / "int4")
    theirs, tokenizer, _ = open_model(tmp_path / "int4", "float32")
    exact = Serving(slots=8, kernel="cpu-exact", cache="float32", context=256)
    with open_generator(tmp_path / "int4", exact) as generator:
        prompts = [generator.encode(prompt) for prompt in PROMPTS]
        sampling = Sampling(max_tokens=64)
        tickets = [generator.stream(prompt, sampling) for prompt in prompts]
        found = [[p.token for p in ticket if p.token is not None] for ticket in tickets]
    for prompt, made in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + made[:-1]])).logits[0, len(prompt) - 1 :]
        assert made == logits.argmax(-1).tolist(), tokenizer.decode(prompt)
        assert len(made) == 64 or made[-1] == tokenizer.eos_token_id
    written = theirs.generate(torch.tensor([prompts[0]]), max_new_tokens=64, do_sample=False)
    assert found[0] == written[0, len(prompts[0]) :].tolist()


_MEASURE = """
import resource, sys, time
from pathlib import Path
import torch
from qexport.formats import open_checkpoint
from qexport.runtime.model import Span
from qexport.runtime.serving import Serving, open_decoder
import qexport.runtime.generator, transformers.models.llama.configuration_llama
torch.ones(4096, 4096) @ torch.ones(4096)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
checkpoint = open_checkpoint(Path(sys.argv[1]))
del torch
before, start = peak(), time.perf_counter()
decoder = open_decoder(checkpoint, Serving(slots=1, context=256, threads=2))
seconds = time.perf_counter() - start
decoder.forward([Span(0, 0, list(range(200)), 200)])
print(peak() - before, seconds)
"""


def test_a_loaded_model_is_as_large_as_its_file(model: Path, tmp_path: Path) -> None:
    pack(rounded(model, "int4", 64), FORMATS["native"], tmp_path / "int4")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "int4")],
        capture_output=True,
        text=True,
        check=True,
    )
    grown = int(done.stdout.split()[0])
    file = sum(path.stat().st_size for path in (tmp_path / "int4").glob("*.safetensors"))
    config = open_checkpoint(tmp_path / "int4").config
    cache = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * 64 * 2 * 256
    assert grown <= 1.15 * file + cache, (grown, file, cache, done.stdout)
