"""Factors that are folded change no output, in any family; AWQ's lower the error of rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qexport.blocks import Blocks
from qexport.grid import GRIDS, Scheme
from qexport.quantize.activations import STAGES, Seen, importance
from qexport.quantize.awq import awq_factors
from qexport.quantize.equalize import fold, tie
from qexport.quantize.fit import fit
from qexport.quantize.smooth import smooth_factors
from qexport.tensor import quantize
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
