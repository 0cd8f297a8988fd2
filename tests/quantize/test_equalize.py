"""Factors that are folded change no output, in any family; AWQ's lower the error of rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

from qexport.blocks import Blocks
from qexport.errors import QexportError
from qexport.formats import open_checkpoint
from qexport.grid import GRIDS, Scheme
from qexport.modelling import build_model
from qexport.quantization import QuantizeConfig, quantize_model
from qexport.quantization.activations import STAGES, Seen, importance
from qexport.quantization.awq import awq_factors
from qexport.quantization.equalize import fold, tie
from qexport.quantization.fit import fit
from qexport.quantization.smooth import smooth_factors
from qexport.tensor import QuantizedTensor, quantize
from qexport.tiny import write_tiny_model
from tests.runtime.families import FAMILIES, make


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_outputs_stay(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    """Norms are rounded to what is stored first, so that nothing of the factors is lost."""
    source = make(tmp_path / "model", family)
    blocks = Blocks(source, stored, torch.device("cpu"))
    torch.manual_seed(0)
    hidden = torch.randn(2, 12, source.config["hidden_size"])
    with torch.no_grad():
        for index in range(len(blocks)):
            block = blocks.make(index)
            wanted = blocks.run(index, block, hidden)
            for stage in STAGES:
                layers: list[Any] = [block.get_submodule(name) for name in stage]
                tied = tie(block, stage[0])
                assert tied is not None
                factors = tied(torch.rand(layers[0].in_features) * 4 + 0.1)
                before = [layer.weight.clone() for layer in layers]
                fold(block, stage[0], stage, factors, stored)
                for layer, old in zip(layers, before, strict=True):
                    assert not torch.equal(layer.weight, old)
            made = blocks.run(index, block, hidden)
            assert float((made - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def seen(width: int) -> tuple[torch.Tensor, Seen]:
    """Inputs of which a few are far more active, as those of language models are."""
    torch.manual_seed(0)
    x = torch.randn(500, width)
    x[:, ::16] *= 20
    return x, Seen(x.T @ x, x.abs().amax(0))


@pytest.mark.parametrize(
    ("grid", "share"), [("seq2", 1.0), ("int3", 0.95), ("int4", 0.8), ("uint4", 0.7)]
)
def test_awq_is_better_than_rounding(grid: str, share: float) -> None:
    """With coarse steps there is little room for weights that are larger than the others."""
    x, what = seen(128)
    scheme = Scheme(GRIDS[grid], 32)
    weights = [torch.randn(24, 128), torch.randn(40, 128)]
    factors = awq_factors(weights, [scheme, scheme], what, lambda values: values)

    def error(weight: torch.Tensor, factors: torch.Tensor) -> float:
        matters = importance(what.hessian) / factors.square()
        found = fit(weight * factors, scheme, matters)
        made = quantize(weight * factors, found.scale, scheme, found.zeros).dequantize() / factors
        return float(((made - weight) @ x.T).square().sum())

    both = [sum(error(weight, f) for weight in weights) for f in (factors, torch.ones(128))]
    assert both[0] <= share * both[1]


def test_smoothing_evens_out() -> None:
    """At half strength the ranges of inputs and of weights become the same."""
    x, what = seen(64)
    weights = [torch.randn(24, 64), torch.randn(40, 64)]
    factors = smooth_factors(weights, what, lambda values: values, 0.5)
    of_inputs = (x / factors).abs().amax(0)
    of_weights = torch.cat(weights).mul(factors).abs().amax(0)
    assert torch.allclose(of_inputs, of_weights, rtol=1e-4)


def test_int8_activations_lose_less_when_smoothed(tmp_path: Path) -> None:
    """A model whose norms make a few inputs a hundred times as large, as trained ones do."""
    folder = write_tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[::13] = 100.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    errors = []
    for strength in (0.0, 0.5):
        settings: dict[str, Any] = {
            **{"model": folder, "output": tmp_path / str(strength), "method": "w8a8"},
            **{"bits": "8", "group_size": None, "calibration": "builtin", "samples": 16},
            **{"length": 32, "smooth": strength, "precision": "fp32"},
        }
        quantize_model(QuantizeConfig(**settings), Console(quiet=True))
        dense, smooth = (build_of(path) for path in (folder, settings["output"]))
        tokens = torch.arange(256).view(8, 32)
        with torch.no_grad():
            wanted = dense(input_ids=tokens).logits
            for module in smooth.modules():
                if isinstance(module, torch.nn.Linear) and module is not smooth.lm_head:
                    module.register_forward_pre_hook(per_token)
            made = smooth(input_ids=tokens).logits
        errors.append(float((made - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.5 * errors[0]


def build_of(folder: Path) -> Any:
    """In float32, dequantized where it is quantized."""
    source = open_checkpoint(folder)

    def read(name: str) -> torch.Tensor:
        value = source[name]
        return value.dequantize() if isinstance(value, QuantizedTensor) else value.float()

    return build_model(source, torch.float32, read)


def per_token(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    """Activations as engines have them that multiply int8 by int8."""
    scale = given[0].abs().amax(-1, keepdim=True) / 127
    return ((given[0] / scale).round() * scale,)


@pytest.mark.parametrize(
    ("family", "folds"), [("Gemma", True), ("Gemma2", True), ("Olmo2", False), ("Cohere", False)]
)
@pytest.mark.parametrize("method", ["awq", "w8a8"])
def test_norms_of_another_form_or_at_another_place(
    family: str, folds: bool, method: str, tmp_path: Path
) -> None:
    """Gemma's norms take no factors, values and up projections do; others are refused."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260}
    ends = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    config = getattr(transformers, f"{family}Config")(**shape, **heads, **ends)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    folder = write_tiny_model(tmp_path / "model")  # for its tokenizer
    model.save_pretrained(folder)
    settings: dict[str, Any] = (
        {"bits": "8"} if method == "w8a8" else {"bits": "3", "group_size": 32}
    )
    asked = QuantizeConfig(
        model=folder,
        output=tmp_path / "run",
        method=method,
        calibration="builtin",
        samples=8,
        length=32,
        **settings,
    )
    if not folds:
        with pytest.raises(QexportError, match="no way to scale the inputs of this architecture"):
            quantize_model(asked, Console(quiet=True))
        assert not (tmp_path / "run" / "config.json").exists()
        return
    results = quantize_model(asked, Console(quiet=True))
    assert len(results["layers"]) == 14
    made = open_checkpoint(tmp_path / "run")
    for name in made:
        if "norm" in name:
            assert torch.equal(made.dense(name), open_checkpoint(folder).dense(name))
