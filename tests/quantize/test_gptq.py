"""GPTQ against what it is an arrangement of: optimal brain surgery, column by column."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qexport.errors import QexportError
from qexport.grid import GRIDS, Scheme
from qexport.paretoq import initial_alpha
from qexport.quantization import GptqOptions
from qexport.quantization.activations import importance, output_error
from qexport.quantization.fit import Fit, fit
from qexport.quantization.gptq import Inputs, compensate, gptq
from qexport.tensor import quantize

OPTIONS = GptqOptions()


def inputs(count: int, width: int) -> Tensor:
    """Correlated, and some far more active than others."""
    torch.manual_seed(0)
    mixed = torch.randn(count, width) @ (torch.eye(width) + 0.4 * torch.randn(width, width))
    return mixed * torch.logspace(0, 1.5, width)[torch.randperm(width)]


def surgery(
    weight: Tensor, hessian: Tensor, found: Fit, scheme: Scheme, options: GptqOptions
) -> Tensor:
    """The inverse Hessian of what is left is eliminated a column at a time, in float64."""
    weight, width = weight.double().clone(), weight.shape[1]
    damping = options.percdamp * hessian.diagonal().double().mean()
    inverse = torch.linalg.inv(hessian.double() + damping * torch.eye(width))
    group = width // found.scale.shape[1]
    order = hessian.diagonal().argsort(descending=True) if options.act_order else range(width)
    for column in map(int, order):
        own = quantize(
            weight[:, column, None],
            found.scale[:, column // group, None],
            Scheme(scheme.grid, None, torch.float32),
            None if found.zeros is None else found.zeros[:, column // group, None],
        )
        error = (weight[:, column] - own.dequantize()[:, 0].double()) / inverse[column, column]
        done = weight[:, column].clone()
        weight -= error[:, None] * inverse[column]
        weight[:, column] = done
        inverse = (
            inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        )
        inverse[column], inverse[:, column] = 0, 0
    return weight


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        replace(OPTIONS, act_order=False),
        replace(OPTIONS, block_size=48),
        replace(OPTIONS, percdamp=0.1),
    ],
    ids=["default", "in order", "blocks of 48", "damped"],
)
@pytest.mark.parametrize(
    "grid", ["ternary", "seq2", "int3", "int4", "int8", "uint2", "uint4", "nf4"]
)
@pytest.mark.parametrize("group", [None, 32])
def test_it_is_optimal_brain_surgery(grid: str, group: int | None, options: GptqOptions) -> None:
    """Code for code in float64; in float32 but for what is near a boundary."""
    scheme, width = Scheme(GRIDS[grid], group), 160
    x = inputs(600, width)
    hessian = x.T @ x
    weight = torch.randn(24, width) * 0.1
    found = fit(weight, scheme, importance(hessian))
    prepared = Inputs.of(hessian, options)

    def codes(made: Tensor) -> Tensor:
        return quantize(made, found.scale, scheme, found.zeros).codes

    wanted = codes(surgery(weight, hessian, found, scheme, options))
    rest = (found, scheme, options.block_size)
    assert torch.equal(codes(compensate(weight.double(), prepared, *rest)), wanted)
    assert (codes(compensate(weight, prepared, *rest)) != wanted).float().mean() < 0.01


@pytest.mark.parametrize("grid", ["binary", "ternary", "seq2", "int3", "int4", "uint2", "uint3"])
def test_scales_that_are_fitted_again_are_better(grid: str) -> None:
    """And GPTQ than rounding, by far."""
    scheme = Scheme(GRIDS[grid], 32)
    x = inputs(600, 160)
    hessian = x.T @ x
    weight = torch.randn(24, 160) * 0.1
    first = fit(weight, scheme, importance(hessian))
    prepared = Inputs.of(hessian)

    def error(refits: int) -> float:
        options = replace(OPTIONS, refits=refits)
        made = gptq(weight, prepared, first, scheme, options).tensor()
        assert torch.equal(made.scales.bfloat16().half(), made.scales)
        return output_error(weight, made.dequantize(), hessian)

    nearest = quantize(weight, first.scale, scheme, first.zeros).dequantize()
    assert error(0) < 0.8 * output_error(weight, nearest, hessian)
    assert error(3) < error(0)


def test_inputs_that_are_never_active() -> None:
    """Their weights are rounded as they are, and disturb nothing."""
    scheme = Scheme(GRIDS["int4"], None)
    x = inputs(200, 32)
    x[:, 5] = 0
    weight = torch.randn(4, 32)
    scale = fit(weight, scheme).scale
    found = compensate(weight, Inputs.of(x.T @ x), Fit(scale), scheme)
    assert bool(found.isfinite().all())
    codes = quantize(found, scale, scheme).codes
    assert torch.equal(codes[:, 5], quantize(weight, scale, scheme).codes[:, 5])


def test_inputs_that_are_nothing() -> None:
    """A layer that sees zeros alone is rounded to nearest."""
    scheme = Scheme(GRIDS["int4"], 16)
    weight, nothing = torch.randn(4, 32), torch.zeros(32, 32)
    first = fit(weight, scheme, importance(nothing))
    found = gptq(weight, Inputs.of(nothing), first, scheme).tensor()
    assert torch.equal(found.codes, quantize(weight, first.scale, scheme).codes)


def test_damping_grows_where_there_is_too_little() -> None:
    """Fewer rows than columns have no inverse by themselves; what has none at all is an error."""
    scheme = Scheme(GRIDS["int4"], None)
    x = inputs(4, 64)
    weight = torch.randn(8, 64)
    scale = fit(weight, scheme).scale
    assert bool(compensate(weight, Inputs.of(x.T @ x), Fit(scale), scheme).isfinite().all())
    with pytest.raises(QexportError, match="more calibration text"):
        Inputs.of(torch.full((64, 64), float("nan")))


def test_importance_weighs_columns() -> None:
    """A scale goes by the columns that count."""
    scheme = Scheme(GRIDS["seq2"], None)
    torch.manual_seed(1)
    weight = torch.cat([torch.randn(6, 16) * 0.1, torch.randn(6, 16)], dim=1)
    first = torch.cat([torch.ones(16), torch.zeros(16)])
    assert bool((fit(weight, scheme, first).scale < fit(weight, scheme).scale).all())
    alpha = initial_alpha(weight, scheme, "mse", first)
    assert bool((alpha < initial_alpha(weight, scheme, "mse")).all())
