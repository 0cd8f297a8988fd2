"""The quantizers against ParetoQ's formulas written a second time, in numpy.

The second writing is of the released formulas in units of alpha, one width at a time, with none of
the project's helpers: float32 for what must be bit-equal, float64 for gradients.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qexport.errors import CheckpointError
from qexport.grid import Scheme
from qexport.paretoq import WIDTHS, effective_scale, fake_quantize, from_upstream, initial_alpha
from qexport.tensor import quantize

Array = NDArray[Any]
BITS = list(WIDTHS)
GROUPS = [None, 32, 64, 128]
SCALES = [torch.float16, torch.float32]
OUT, IN = 24, 256
QP = {"1": 1, "1.58": 1, "2": 1, "3": 3, "4": 7}


def numpy_portable(step: Array) -> Array:
    """Round float64 values to 8 significant bits and multiples of 2**-23, ties to even."""
    _, exponent = np.frexp(step)
    unit = np.maximum(np.ldexp(1.0, exponent - 8), 2.0**-23)
    found: Array = np.clip(np.rint(step / unit) * unit, 2.0**-23, 65280.0)
    return found


def numpy_scale(bits: str, alpha: Array, portable: bool) -> Array:
    """The stored step, float32, from float32 alpha."""
    alpha = np.maximum(alpha, np.float32(1e-5))
    step = alpha * np.float32({"1": 2.0, "1.58": 2 / 3, "2": 0.5}.get(bits, 1.0))
    return numpy_portable(step.astype(np.float64)).astype(np.float32) if portable else step


def numpy_forward(bits: str, w: Array, scale: Array) -> tuple[Array, Array]:
    """(codes, values) in float32, written width by width; w [..., group], scale [..., 1]."""
    v = w / scale
    if bits == "1":
        codes = np.where(w >= 0, 1, 0)
        return codes, np.where(codes == 1, np.float32(0.5), np.float32(-0.5)) * scale
    if bits == "1.58":
        level = np.rint(np.clip(v, np.float32(-1.485), np.float32(1.485)))
        return level + 1, level * scale
    if bits == "2":
        level = np.rint(np.clip(v, np.float32(-1.98), np.float32(1.98)) - np.float32(0.5))
        return level + 2, (level + np.float32(0.5)) * scale
    low, high = {"3": (-4, 3), "4": (-8, 7)}[bits]
    level = np.clip(np.rint(v), low, high)
    return level - low, level * scale


def numpy_gradients(
    bits: str, w: Array, scale: Array, values: Array, grad: Array
) -> tuple[Array, Array]:
    """(dL/dW, dL/dalpha) in float64 by the table of the paper's code; arrays [..., group].

    Which side of a bound a weight lies on is decided in float32, as in the forward pass: the
    largest weight of a group lies on the bound itself under the paper's initial scale.
    """
    step = {"1": 2.0, "1.58": 2 / 3, "2": 0.5}.get(bits, 1.0)
    low, high = {"1": (-1, 1), "3": (-4, 3), "4": (-8, 7)}.get(bits, (-0.99, 0.99))
    u32 = w / (scale / np.float32(step))
    inside = (u32 >= np.float32(low)) & (u32 <= np.float32(high))
    w, values, grad = (a.astype(np.float64) for a in (w, values, grad))
    alpha = scale.astype(np.float64) / step
    u = w / alpha
    if bits == "1":
        h = np.where(w >= 0, 1.0, -1.0)
    elif bits in ("3", "4"):
        h = np.where(inside, np.rint(u) - u, np.where(u > 0, high, low))
    else:
        saturated = {"1.58": 2 / 3, "2": 0.75}[bits]
        h = np.where(inside, values / alpha - u, np.where(u > 0, saturated, -saturated))
    s = 1 / math.sqrt(w.size * QP[bits])
    return np.where(inside, grad, 0.0), s * (grad * h).sum(-1)


def weights(kind: str, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    w = rng.normal(0, 0.02, (OUT, IN)).astype(np.float32)
    if kind == "zero rows":
        w[::3] = 0
    elif kind == "outlier":
        w[:, 7] = 3.0e4
        w[0, 9] = -1.0e30
    elif kind == "denormal":
        w = (w * np.float32(1e-38)).astype(np.float32)
        assert (np.abs(w[w != 0]) < 1.2e-38).any()
    elif kind == "ties":
        w = (rng.integers(-20, 21, (OUT, IN)) / 64).astype(np.float32)
    return w


def grouped(a: Array, group: int | None) -> Array:
    return a.reshape(OUT, -1, group or IN)


KINDS = ["normal", "zero rows", "outlier", "denormal", "ties"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SCALES, ids=["portable", "float32"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_codes_values_and_gradients(
    bits: str, group: int | None, dtype: torch.dtype, kind: str
) -> None:
    scheme = Scheme(WIDTHS[bits].grid, group, dtype)
    w = weights(kind)
    if kind == "ties":  # alphas that are powers of two make every quotient exact
        alpha = np.full((OUT, grouped(w, group).shape[1]), 0.25, np.float32)
    else:
        alpha = initial_alpha(torch.from_numpy(w), scheme, "paper").numpy()
        if kind == "normal":
            alpha = alpha * np.float32(0.6)  # so that much is clipped
    scale = numpy_scale(bits, alpha, dtype == torch.float16)
    codes, values = numpy_forward(bits, grouped(w, group), scale[..., None])

    weight = torch.from_numpy(w).requires_grad_()
    learned = torch.from_numpy(alpha).requires_grad_()
    assert np.array_equal(effective_scale(learned.detach(), scheme).numpy(), scale)
    found = quantize(weight.detach(), effective_scale(learned.detach(), scheme), scheme)
    assert np.array_equal(found.codes.numpy(), codes.reshape(OUT, IN))
    output = fake_quantize(weight, learned, scheme)
    assert np.array_equal(output.detach().numpy(), values.reshape(OUT, IN))
    assert torch.equal(found.dequantize(), output.detach())
    for narrow in (torch.bfloat16, torch.float16):
        expected = torch.from_numpy(values.reshape(OUT, IN)).to(narrow)
        assert torch.equal(found.dequantize(narrow), expected)

    grad = np.random.default_rng(1).normal(0, 1, (OUT, IN)).astype(np.float32)
    torch.autograd.backward(output, torch.from_numpy(grad))
    assert weight.grad is not None
    assert learned.grad is not None
    grad_w, grad_alpha = numpy_gradients(
        bits, grouped(w, group), scale[..., None], values, grouped(grad, group)
    )
    assert np.array_equal(weight.grad.numpy(), grad_w.reshape(OUT, IN).astype(np.float32))
    assert relative_error(learned.grad.numpy(), grad_alpha) < 1e-6


def relative_error(found: Array, expected: Array) -> float:
    scale = np.linalg.norm(expected)
    return float(np.linalg.norm(found.astype(np.float64) - expected) / scale) if scale else 0.0


@pytest.mark.parametrize("bits", BITS)
def test_the_float32_forward_is_the_released_formula_in_alpha(bits: str) -> None:
    """With float32 scales the result is the paper's own, computed the way upstream writes it."""
    w = torch.from_numpy(weights("normal"))
    scheme = Scheme(WIDTHS[bits].grid, None, torch.float32)
    alpha = initial_alpha(w, scheme, "paper")
    u = w / alpha
    forward: dict[str, Callable[[], torch.Tensor]] = {
        "1": lambda: alpha * w.sign(),
        "1.58": lambda: alpha * (torch.round(u.clamp(-0.99, 0.99) * 1.5) / 1.5),
        "2": lambda: alpha * ((torch.round(u.clamp(-0.99, 0.99) * 2 - 0.5) + 0.5) / 2),
        "3": lambda: alpha * u.round().clamp(-4, 3),
        "4": lambda: alpha * u.round().clamp(-8, 7),
    }
    assert torch.equal(fake_quantize(w, alpha, scheme), forward[bits]())


@pytest.mark.parametrize("bits", BITS)
def test_each_group_has_its_own_initial_scale(bits: str) -> None:
    w = torch.ones(4, 64)
    w[:, 32:] = 8.0
    scheme = Scheme(WIDTHS[bits].grid, 32)
    alpha = initial_alpha(w, scheme, "paper")
    divisor = {"3": 3.0, "4": 7.0}.get(bits, 1.0)
    assert torch.equal(alpha, torch.tensor([[1.0, 8.0]]).expand(4, 2) / divisor)


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("bits", BITS)
def test_mse_search_is_never_worse_than_the_widest_scale(bits: str, group: int | None) -> None:
    w = torch.from_numpy(weights("normal"))
    scheme = Scheme(WIDTHS[bits].grid, group)
    divisor = {"3": 3.0, "4": 7.0}.get(bits, 1.0)
    widest = w.view(OUT, -1, group or IN).abs().amax(-1) / divisor

    def error(alpha: torch.Tensor) -> torch.Tensor:
        values = quantize(w, effective_scale(alpha, scheme), scheme).dequantize()
        return (values - w).view(OUT, -1, group or IN).square().sum(-1)

    best = error(initial_alpha(w, scheme, "mse"))
    assert (best <= error(widest)).all()
    for fraction in np.arange(1, 33) / 32:
        assert (best <= error(widest * fraction)).all()


def upstream_forward(w: torch.Tensor, alpha: torch.Tensor, bits: str) -> torch.Tensor:
    """Upstream's forward from its description, every operation in the tensors' own dtype."""
    alpha = torch.where(alpha > 1e-5, alpha, torch.full_like(alpha, 1e-5))
    if bits == "1":
        return w.sign() * alpha
    if bits in ("3", "4"):
        low, high = {"3": (-4, 3), "4": (-8, 7)}[bits]
        return (w / alpha).round().clamp(low, high) * alpha
    levels, shift = {"1.58": (1.5, 0.0), "2": (2.0, 0.5)}[bits]
    return (torch.round((w / alpha).clamp(-0.99, 0.99) * levels - shift) + shift) / levels * alpha


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", BITS)
def test_an_upstream_checkpoint_is_read_as_it_was_trained(bits: str, dtype: torch.dtype) -> None:
    w = torch.from_numpy(weights("normal")).to(dtype)
    scheme = Scheme(WIDTHS[bits].grid, None, dtype)
    alpha = (initial_alpha(w.float(), scheme, "paper") * 0.7).to(dtype)
    found = from_upstream(w, alpha, scheme)
    assert torch.equal(found.dequantize(dtype), upstream_forward(w, alpha, bits))


def test_an_upstream_zero_at_one_bit_is_refused() -> None:
    w = torch.from_numpy(weights("zero rows"))
    with pytest.raises(CheckpointError, match="exactly zero"):
        from_upstream(w, torch.ones(OUT, 1), Scheme(WIDTHS["1"].grid, None, torch.float32))
