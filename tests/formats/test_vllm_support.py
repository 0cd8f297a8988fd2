"""On which devices vLLM is said to read a folder, and that the sentence says the same."""

from pathlib import Path

import pytest
from rich.console import Console

from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.vllm_support import unlike_parts, vllm_support
from qexport.grid import GRIDS
from qexport.quantization import QuantizeConfig, quantize_model

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
        ("somebody's", ["int4"], set()),
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


def test_layers_that_vllm_fuses_have_to_be_alike(tiny_model: Path, tmp_path: Path) -> None:
    """It refuses others, and says so after loading for a while."""
    for excluded, apart in (("v_proj", True), ("down_proj", False)):
        config = QuantizeConfig(
            tiny_model, tmp_path / excluded, "rtn", "4", group_size=32, exclude=(f"*.{excluded}",)
        )
        quantize_model(config, Console(quiet=True))
        source = open_checkpoint(config.output)
        unlike = unlike_parts(source)
        assert (unlike is not None and "k_proj, model.layers.0.self_attn.v_proj" in unlike) == apart
        for form in ("gptq", "awq", "compressed-tensors"):
            assert bool(vllm_support(form, ["int4"], unlike=unlike).devices) != apart
        assert vllm_support("native", ["int4"], unlike=unlike).devices
