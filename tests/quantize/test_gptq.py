"""GPTQ against what it is an arrangement of: optimal brain surgery, column by column."""

import pytest
import torch
from torch import Tensor

from qexport.errors import QexportError
from qexport.grid import GRIDS, Scheme
from qexport.paretoq import effective_scale, initial_alpha
from qexport.quantize.gptq import compensate
from qexport.tensor import quantize


def inputs(count: int, width: int) -> Tensor:
    """Correlated, and some far more active than others."""
    torch.manual_seed(0)
    mixed = torch.randn(count, width) @ (torch.eye(width) + 0.4 * torch.randn(width, width))
    return mixed * torch.logspace(0, 1.5, width)[torch.randperm(width)]


def surgery(weight: Tensor, hessian: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """The inverse Hessian of what is left is eliminated a column at a time, in float64."""
    weight, width = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(width)
    inverse = torch.linalg.inv(damped)
    group = width // scale.shape[1]
    for column in hessian.diagonal().argsort(descending=True).tolist():
        own = quantize(
            weight[:, column, None].float(),
            scale[:, column // group, None],
            Scheme(scheme.grid, None, torch.float32),
        )
        error = (weight[:, column] - own.dequantize()[:, 0].double()) / inverse[column, column]
        done = weight[:, column].clone()
        weight -= error[:, None] * inverse[column]
        weight[:, column] = done
        inverse = (
            inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        )
        inverse[column], inverse[:, column] = 0, 0
    return weight.float()


@pytest.mark.parametrize("grid", ["seq2", "int3", "int4", "ternary"])
@pytest.mark.parametrize("group", [None, 32])
def test_it_is_optimal_brain_surgery(grid: str, group: int | None) -> None:
    """Code for code, and better than rounding; blocks of columns are an arrangement alone."""
    scheme, width = Scheme(GRIDS[grid], group), 160
    x = inputs(600, width)
    hessian = x.T @ x
    weight = torch.randn(24, width) * 0.1
    scale = effective_scale(initial_alpha(weight, scheme, "mse"), scheme)
    found = quantize(compensate(weight, hessian, scale, scheme), scale, scheme)
    wanted = quantize(surgery(weight, hessian, scale, scheme), scale, scheme)
    differing = (found.codes != wanted.codes).float().mean()
    assert differing < 0.005  # float32 near a boundary

    def error(made: Tensor) -> float:
        return float(((made - weight) @ x.T).square().sum())

    assert error(found.dequantize()) < 0.6 * error(quantize(weight, scale, scheme).dequantize())


def test_inputs_that_are_never_active() -> None:
    """Their weights are rounded as they are, and disturb nothing."""
    scheme = Scheme(GRIDS["int4"], None)
    x = inputs(200, 32)
    x[:, 5] = 0
    weight = torch.randn(4, 32)
    scale = effective_scale(initial_alpha(weight, scheme, "mse"), scheme)
    found = compensate(weight, x.T @ x, scale, scheme)
    assert bool(found.isfinite().all())
    codes = quantize(found, scale, scheme).codes
    assert torch.equal(codes[:, 5], quantize(weight, scale, scheme).codes[:, 5])


def test_damping_grows_where_there_is_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows than columns have no inverse by themselves; what has none at all is an error."""
    scheme = Scheme(GRIDS["int4"], None)
    x = inputs(4, 64)
    weight = torch.randn(8, 64)
    scale = effective_scale(initial_alpha(weight, scheme, "mse"), scheme)
    assert bool(compensate(weight, x.T @ x, scale, scheme).isfinite().all())
    with pytest.raises(QexportError, match="more calibration text"):
        compensate(weight, torch.full((64, 64), float("nan")), scale, scheme)


def test_importance_weighs_columns() -> None:
    """A scale goes by the columns that count."""
    scheme = Scheme(GRIDS["seq2"], None)
    torch.manual_seed(1)
    weight = torch.cat([torch.randn(6, 16) * 0.1, torch.randn(6, 16)], dim=1)
    first = torch.cat([torch.ones(16), torch.zeros(16)])
    alpha = initial_alpha(weight, scheme, "mse", first)
    assert bool((alpha < initial_alpha(weight, scheme, "mse")).all())
