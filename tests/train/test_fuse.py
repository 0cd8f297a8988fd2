"""Compiled quantizers: the same values bit by bit, and the others where they would not be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qexport import paretoq
from qexport.errors import UnsupportedError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.grid import Scheme
from qexport.paretoq import WIDTHS, effective_scale, fake_quantize, initial_alpha
from qexport.tensor import quantize
from qexport.training import TrainConfig, train
from qexport.training.fuse import why_not

CPU = torch.device("cpu")


@pytest.mark.parametrize("gradient", ["paper", "stable"])
@pytest.mark.parametrize("bits", list(WIDTHS))
def test_values_and_gradients_are_those_of_the_definition(bits: str, gradient: Any) -> None:
    """Also of the next shape and group size, for which a compiler might take the last one's."""
    cases: list[tuple[int | None, torch.dtype, tuple[int, int], torch.dtype]] = [
        (64, torch.float16, (48, 192), torch.bfloat16),
        (32, torch.float16, (96, 64), torch.bfloat16),
        (None, torch.float32, (33, 128), torch.float32),
    ]
    # a compilation takes seconds
    for group_size, scale_dtype, shape, dtype in cases if bits == "2" else cases[:1]:
        scheme = Scheme(WIDTHS[bits].grid, group_size, scale_dtype)
        weight = torch.randn(shape) * 0.02
        alpha = initial_alpha(weight, scheme, "mse")
        wanted = quantize(weight, effective_scale(alpha, scheme), scheme).dequantize()
        down = weight.to(dtype)
        grads = []
        for fused in (False, True):
            w, a = weight.clone().requires_grad_(), alpha.clone().requires_grad_()
            values = fake_quantize(w, a, scheme, gradient, dtype=dtype, fused=fused)
            assert torch.equal(values, wanted.to(dtype))
            grads.append(torch.autograd.grad(values, (w, a), down))
        for plain, compiled in zip(*grads, strict=True):
            assert torch.allclose(plain, compiled, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))
        assert why_not([scheme], gradient, CPU, dtype) is None


@pytest.mark.parametrize("gradient", ["paper", "stable"])
@pytest.mark.parametrize("bits", list(WIDTHS))
def test_a_dtype_of_products_is_a_cast(bits: str, gradient: Any) -> None:
    """The same values and gradients, bit for bit, as of float32 values that are cast after it."""
    scheme = Scheme(WIDTHS[bits].grid, 32)
    weight = (torch.randn(24, 64) * 0.02).requires_grad_()
    alpha = initial_alpha(weight, scheme, "mse").requires_grad_()
    down = torch.randn(24, 64).bfloat16()
    both = (
        fake_quantize(weight, alpha, scheme, gradient).bfloat16(),
        fake_quantize(weight, alpha, scheme, gradient, dtype=torch.bfloat16),
    )
    found = [(values, *torch.autograd.grad(values, (weight, alpha), down)) for values in both]
    for cast, given in zip(*found, strict=True):
        assert torch.equal(cast, given)


def test_a_compiler_that_rounds_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme(WIDTHS["4"].grid, 32)

    def careless(function: Any) -> Any:
        if function is not paretoq._quantized:
            return function
        return lambda weight, *rest: function(weight.nextafter(weight + 1), *rest)

    monkeypatch.setattr(paretoq, "compiled", careless)
    assert "rounds" in str(why_not([scheme], "paper", CPU))


def test_gradients_that_are_another_grids_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(function: Any) -> Any:
        if function is not paretoq._gradients:
            return function
        return lambda *given: function(*(*given[:4], WIDTHS["3"], *given[5:]))

    monkeypatch.setattr(paretoq, "compiled", mistaken)
    assert "gradients" in str(why_not([Scheme(WIDTHS["4"].grid, 32)], "paper", CPU))


def test_no_compiler(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, it is an error that says so; otherwise the run goes on without."""

    def broken(function: Any) -> Any:
        raise RuntimeError("no g++ here")

    monkeypatch.setattr(paretoq, "compiled", broken)
    settings = (tiny_model, "builtin", tmp_path / "run", "2", 32)
    with pytest.raises(UnsupportedError, match=r"--compile: torch.compile fails \(no g\+\+ here\)"):
        train(TrainConfig(*settings, max_steps=1, compile=True), Console(quiet=True))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("qexport.training.fuse._ENOUGH", 0)
    assert train(TrainConfig(*settings, max_steps=1), Console(quiet=True))["steps"] == 1


def test_a_compiled_run_is_the_other_one(tiny_model: Path, tmp_path: Path) -> None:
    runs = {}
    for name, fused in (("plain", False), ("fused", True)):
        config = TrainConfig(
            tiny_model,
            "builtin",
            tmp_path / name,
            "3",
            32,
            max_steps=3,
            max_length=32,
            lr=1e-3,
            precision="fp32",
            block_epochs=1,
            block_windows=8,
            compile=fused,
        )
        runs[name] = train(config, Console(quiet=True))
    assert runs["fused"]["final_loss"] == pytest.approx(runs["plain"]["final_loss"], abs=1e-4)
    source = open_checkpoint(tmp_path / "fused")
    assert pack(source, FORMATS["native"], tmp_path / "packed").exact
