"""Mixtures of experts: taken apart they answer alike, and are quantized one by one."""

from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

from qexport.errors import InputError, QexportError, RefusedError, UnsupportedError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.base import Options
from qexport.formats.pack import pack
from qexport.modelling import build_model, meta_model
from qexport.quantization import quantize_model
from qexport.quantization.driver import _beside
from qexport.runtime.loader import open_model
from qexport.runtime.vllm_server import preflight
from qexport.tiny import write_tiny_model
from qexport.training import TrainConfig, train
from tests.quantize.test_run import config

QUIET = Console(quiet=True)
EXPERTS = 6


@pytest.fixture(scope="module", params=["Qwen3Moe", "Olmoe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of six experts; the last of the first layer is never chosen."""
    folder = tmp_path_factory.mktemp("moe") / "model"
    write_tiny_model(folder)
    settings = getattr(transformers, f"{request.param}Config")(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=256,
        pad_token_id=256,
    )
    torch.manual_seed(0)
    made = getattr(transformers, f"{request.param}ForCausalLM")(settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)
        # the router is given a direction that all tokens have, and the last expert its opposite
        made.model.layers[0].mlp.gate.weight[-1] = 0
        made.model.layers[0].post_attention_layernorm.weight[0] = 0
        made.model.embed_tokens.weight[:, 1] = 4
        made.model.layers[0].mlp.gate.weight[:, 1] = 5
        made.model.layers[0].mlp.gate.weight[-1, 1] = -50
    made.save_pretrained(folder)
    return folder


def test_taken_apart_they_answer_alike(model: Path) -> None:
    source = open_checkpoint(model)
    whole = build_model(source, torch.float32, lambda name: source.dense(name).float())
    apart = meta_model(source).to_empty(device="cpu")
    apart.load_state_dict({name: source.dense(name).float() for name in source}, strict=True)
    for module in ("rotary_emb",):
        setattr(apart.model, module, getattr(whole.model, module))
    tokens = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        mine, theirs = apart(tokens).logits, whole(tokens).logits
    assert torch.allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("method", ["gptq", "awq", "signround", "rtn"])
def test_each_expert_is_quantized(model: Path, tmp_path: Path, method: str) -> None:
    run = tmp_path / "run"
    results = quantize_model(config(model, run, method=method), QUIET)
    layers = results["layers"]
    assert len(layers) == 2 * (4 + 3 * EXPERTS)
    source = open_checkpoint(run)
    assert f"model.layers.1.mlp.experts.{EXPERTS - 1}.up_proj" in source.modules
    assert "model.layers.0.mlp.gate.weight" in source
    if method == "gptq":
        unseen = layers[f"model.layers.0.mlp.experts.{EXPERTS - 1}.gate_proj"]
        assert (unseen["tokens"], unseen["enough"]) == (0, False)
        seen = [layer for layer in layers.values() if layer.get("enough", True)]
        assert len(seen) >= 20
        for layer in seen:
            assert layer["error"] < layer["rtn_error"]
    for form in ("native", "gptq", "compressed-tensors"):
        assert pack(source, FORMATS[form], tmp_path / form, Options()).exact
    loaded, _, _ = open_model(tmp_path / "native", "float32")
    dense, _, _ = open_model(model, "float32")
    tokens = torch.arange(3, 35).view(1, -1)
    with torch.no_grad():
        mine, theirs = loaded(tokens).logits, dense(tokens).logits
    assert float((mine - theirs).norm() / theirs.norm()) < 0.5


def test_experts_that_saw_nothing_can_be_an_error(model: Path, tmp_path: Path) -> None:
    asked = config(model, tmp_path / "run", unseen_experts="error")
    with pytest.raises(QexportError, match=r"layers.0.mlp.experts.\d saw \d+ tokens.*give more"):
        quantize_model(asked, QUIET)


def test_parts_of_a_model(model: Path, tmp_path: Path) -> None:
    """A block alone, and attention alone; a shared expert, which no stage has, is refused."""
    for number, (said, sequential) in enumerate(
        (({"include": ("*.layers.0.*",)}, True), ({"exclude": ("*.experts.*",)}, False))
    ):
        asked = config(model, tmp_path / str(number), true_sequential=sequential, **said)
        quantize_model(asked, QUIET)
        modules = open_checkpoint(tmp_path / str(number)).modules
        assert len(modules) == (4 + 3 * EXPERTS if sequential else 8)
    shared = {f"model.layers.0.mlp.{part}.up_proj": 0 for part in ("experts.0", "shared_experts")}
    assert _beside(shared) == ["model.layers.0.mlp.shared_experts.up_proj"]  # type: ignore[arg-type]


def test_what_is_said_of_packed_ones(model: Path, tmp_path: Path) -> None:
    quantize_model(config(model, tmp_path / "run", method="rtn"), QUIET)
    pack(open_checkpoint(tmp_path / "run"), FORMATS["native"], tmp_path / "native")
    card = (tmp_path / "native" / "README.md").read_text()
    assert "vLLM does not read it" in card and "qexport.hf" not in card
    with pytest.raises(UnsupportedError, match="experts in this format"):
        preflight(tmp_path / "native", "auto")
    quantize_model(config(model, tmp_path / "nf4", method="nf4", group_size=None), QUIET)
    for name in ("bitsandbytes", "gguf"):
        with pytest.raises(RefusedError):
            pack(open_checkpoint(tmp_path / "nf4"), FORMATS[name], tmp_path / name)


def test_what_is_not_done_with_them(model: Path, tmp_path: Path) -> None:
    asked = TrainConfig(model, "builtin", tmp_path / "run", "2", max_steps=1, max_length=32)
    with pytest.raises(InputError, match="a mixture of experts, which is not trained yet"):
        train(asked, QUIET)
    with pytest.raises(InputError, match="not for mixtures of experts"):
        quantize_model(config(model, tmp_path / "run", target_bpw=3.5), QUIET)
