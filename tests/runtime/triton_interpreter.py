"""The Triton kernel under Triton's interpreter, against the reference.

test_triton.py runs this file in a process whose environment turns the interpreter on: Triton looks
at it when it is imported, and other tests are not to find a kernel for GPUs on the CPU.
"""

from zlib import crc32

import pytest
import torch
from torch import Tensor

from qexport.grid import GRIDS, Scheme
from qexport.runtime.kernels import KERNELS, choose
from qexport.runtime.kernels import triton as module
from qexport.tensor import QuantizedTensor, portable

CPU = torch.device("cpu")
GROUPS = (16, 32, 48, 64, 128, None)
SHAPES = ((17, 768), (70, 192))  # of outputs and inputs


def random_weight(grid: str, group: int | None, shape: tuple[int, int]) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(crc32(f"{grid} {group} {shape}".encode()))
    scheme = Scheme(GRIDS[grid], group)
    rows, groups, levels = shape[0], scheme.groups(shape[1]), GRIDS[grid].levels
    codes = torch.randint(0, levels, shape, dtype=torch.uint8, generator=generator)
    scales = portable(torch.rand(rows, groups, generator=generator) * 0.1 + 0.001).half()
    zeros = torch.randint(0, levels, (rows, groups), dtype=torch.uint8, generator=generator)
    return QuantizedTensor(codes, scales, scheme, zeros if scheme.grid.zeros else None)


def check(weight: QuantizedTensor, x: Tensor, bias: Tensor | None) -> None:
    """Within the error of float32 sums, and of rounding the result to x's dtype."""
    found = KERNELS["triton"].prepack(weight, bias).matmul(x)
    dense = weight.dequantize().double()
    want = x.double() @ dense.T + (0 if bias is None else bias.double())
    sums = x.double().abs() @ dense.abs().T + (0 if bias is None else bias.double().abs())
    bound = sums * 2.0**-23 * 24 + want.abs() * torch.finfo(x.dtype).eps
    assert found.dtype == x.dtype
    assert bool(((found.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", sorted(name for name, grid in GRIDS.items() if grid.uniform))
def test_every_scheme(grid: str, shape: tuple[int, int]) -> None:
    for i, group in enumerate(group for group in GROUPS if group is None or shape[1] % group == 0):
        weight = random_weight(grid, group, shape)
        tokens = (1, 3, 16, 17)[i % 4]
        bias = torch.randn(shape[0]) if i % 2 else None
        check(weight, torch.randn(tokens, shape[1]), bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 9, 33, 70])
def test_tokens_and_dtypes(dtype: torch.dtype, tokens: int) -> None:
    for grid in ("seq2", "int3", "int4", "uint8"):
        x = torch.randn(tokens, 384).to(dtype)
        check(random_weight(grid, 64, (40, 384)), x, torch.randn(40))


def test_inputs_of_any_number() -> None:
    """Rows that end within a chunk, a field, or a word."""
    for inputs in (1, 15, 33, 100, 511, 513, 1025):
        check(random_weight("seq2", None, (20, inputs)), torch.randn(2, inputs), None)
        check(random_weight("int3", None, (20, inputs)), torch.randn(2, inputs), None)


def test_split_inputs_are_summed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, bias = random_weight("int4", 32, (20, 1280)), torch.randn(2, 1280), torch.randn(20)
    whole = KERNELS["triton"].prepack(weight, bias).matmul(x)
    monkeypatch.setattr(module, "_processors", lambda device: 132)
    assert module._TritonLinear(weight, bias)._splits(x) == 8
    check(weight, x, bias)
    parts = [KERNELS["triton"].prepack(weight, bias).matmul(x) for _ in range(3)]
    assert torch.equal(parts[0], parts[1]) and torch.equal(parts[1], parts[2])
    torch.testing.assert_close(parts[0], whole)


def test_no_tokens() -> None:
    found = KERNELS["triton"].prepack(random_weight("int4", 32, (20, 64))).matmul(torch.ones(0, 64))
    assert found.shape == (0, 20)


def test_it_is_a_custom_operation() -> None:
    """torch.compile and export see shapes without running it."""
    from qexport.runtime.kernels.triton_matmul import matmul

    linear = module._TritonLinear(random_weight("uint4", 64, (24, 128)), torch.randn(24))
    arguments = (torch.randn(3, 128), linear._low, linear._high, linear._scales, linear._zeros)
    rest = (linear._bias, 64, 8.0, 4, 0, 64, 1)
    torch.library.opcheck(matmul, (*arguments, *rest))


def test_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS["triton"]
    assert "no multiple of 16" in str(kernel.refuses(Scheme(GRIDS["int4"], 8), (16, 64), CPU))
    assert kernel.refuses(Scheme(GRIDS["seq2"], 16), (16, 64), CPU) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert kernel.refuses(Scheme(GRIDS["seq2"], 16), (16, 64), CPU) == "it runs on GPUs, not on cpu"
    assert "triton" in choose(Scheme(GRIDS["seq2"], 16), (16, 64), CPU).passed_over
    with pytest.raises(ValueError, match="not on cpu"):
        kernel.prepack(random_weight("int4", 32, (16, 64)))
