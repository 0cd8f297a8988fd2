"""On which devices vLLM is said to read a folder, and that the sentence says the same."""

import pytest

from qexport.formats import FORMATS
from qexport.formats.vllm_support import vllm_support
from qexport.grid import GRIDS

BOTH = {"cpu", "cuda"}


@pytest.mark.parametrize(
    ("form", "stored", "devices"),
    [
        ("native", ["seq2", "int3"], BOTH),
        ("native", ["nf4"], set()),
        ("gptq", ["int4"], BOTH),
        ("gptq", ["int4", "int8"], {"cuda"}),
        ("gptq", ["int3"], set()),
        ("gptq", ["uint4"], set()),
        ("gptq_v2", ["int4"], set()),
        ("awq", ["uint4"], BOTH),
        ("compressed-tensors", ["int4"], BOTH),
        ("compressed-tensors", ["int2"], BOTH),
        ("int-quantized", ["int8"], BOTH),
        ("humming", ["int3"], {"cuda"}),
        ("bitsandbytes", ["nf4"], set()),
        ("gguf", ["int4"], set()),
    ],
)
def test_devices(form: str, stored: list[str], devices: set[str]) -> None:
    assert vllm_support(form, stored).devices == devices


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("form", list(FORMATS))
def test_the_sentence_says_the_same(form: str, experts: bool) -> None:
    for grid in GRIDS:
        found = vllm_support(form, [grid], experts=experts)
        refused = "vLLM does not read it" in found.sentence or "as version 1" in found.sentence
        assert refused == (not found.devices)
        if found.devices == {"cuda"}:
            assert "on NVIDIA GPUs" in found.sentence


def test_experts() -> None:
    assert not vllm_support("native", ["int4"], experts=True).devices
    assert "not tried" in vllm_support("gptq", ["int4"], experts=True).sentence
