"""Every kernel against the reference: all schemes, odd shapes, any number of tokens."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qexport.errors import InputError, UnsupportedError
from qexport.grid import GRIDS, Grid, Scheme
from qexport.runtime.kernels import KERNELS, Kernel, choose
from qexport.runtime.kernels.cpu import CpuKernel
from qexport.runtime.kernels.cpu_library import library
from qexport.runtime.kernels.humming import _exactly
from qexport.runtime.kernels.memory import Arena
from qexport.tensor import QuantizedTensor, portable

CPU = torch.device("cpu")
TOKENS = (*range(1, 10), 16, 64, 200)
SHAPES = ((48, 256), (33, 160), (17, 100), (5, 32), (130, 384))
GROUPS = (None, 32, 64, 128, 96, 256)
ROUNDING = ("cpu",)  # kernels that round activations to int8
HERE = [kernel for kernel in KERNELS.values() if kernel.device in (None, "cpu")]

pytestmark = pytest.mark.skipif(library() is None, reason="installed without a C++ compiler")


@pytest.fixture(params=["avx512-vnni", "avx2", "generic"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    found = library()
    assert found is not None
    before = found.qx_isa()
    if found.qx_force_isa(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    found.qx_force_isa(before)


def weight(
    grid: Grid, group: int | None, shape: tuple[int, int], dtype: torch.dtype
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    scheme = Scheme(grid, group, dtype)
    groups = (shape[0], scheme.groups(shape[1]))
    codes = torch.randint(0, grid.levels, shape, generator=generator, dtype=torch.uint8)
    scales = portable(torch.rand(groups, generator=generator) * 0.1 + 0.001).to(dtype)
    zeros = torch.randint(0, grid.levels, groups, generator=generator, dtype=torch.uint8)
    minima = torch.rand(groups, generator=generator) if grid.minima else None
    return QuantizedTensor(codes, scales, scheme, zeros if grid.zeros else None, minima)


def fits(shape: tuple[int, int], group: int | None) -> bool:
    return group is None or shape[1] % group == 0


def int8_bound(held: QuantizedTensor, x: Tensor) -> Tensor:
    """Largest error of int8 activations [tokens, out]: half a step of each, times its weight.

    A step is the largest activation of its group over 127; groups here are at most 128 inputs.
    """
    size = held.scheme.group_size
    size = 128 if size is None else next(s for s in (128, 96, 64, 32) if size % s == 0)
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % size)).view(len(x), -1, size)
    half = padded.abs().amax(-1, keepdim=True).expand(padded.shape) / 254
    steps = half.reshape(len(x), -1)[:, : x.shape[1]]
    return steps.double() @ held.dequantize().double().abs().T * 1.001 + 1e-5


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if not grid.uniform])
def test_grids_that_are_not_uniform_are_for_the_reference_alone(name: str) -> None:
    for dtype in (torch.float16, torch.float32):
        for kernel in KERNELS.values():
            reason = kernel.refuses_scheme(Scheme(GRIDS[name], 64, dtype), (256, 256))
            assert (reason is None) == (kernel.name == "reference"), kernel.name


@pytest.mark.parametrize(
    "grid", [grid for grid in GRIDS.values() if grid.uniform], ids=lambda grid: grid.name
)
def test_every_grid_and_shape(isa: str, grid: Grid) -> None:
    exact, fast = CpuKernel(exact=True), CpuKernel()
    for shape in SHAPES:
        for group in filter(lambda group: fits(shape, group), GROUPS):
            dtype = torch.float32 if group == 64 else torch.float16
            held = weight(grid, group, shape, dtype)
            bias = torch.linspace(-1, 1, shape[0]) if group == 32 else None
            linears = exact.prepack(held, bias), fast.prepack(held, bias)
            dense = held.dequantize().double()
            for m in TOKENS:
                x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m))
                want = torch.nn.functional.linear(
                    x.double(), dense, None if bias is None else bias.double()
                )
                summed = x.double().abs() @ dense.abs().T  # what float32 sums are exact to
                error = (linears[0].matmul(x) - want).abs()
                assert bool((error <= summed * 1e-6 + 1e-5).all()), (shape, group, m)
                error = (linears[1].matmul(x) - want).abs()
                assert bool((error <= int8_bound(held, x)).all()), (shape, group, m)


@pytest.mark.parametrize("kernel", HERE, ids=lambda kernel: kernel.name)
def test_every_kernel_of_this_machine(kernel: Kernel) -> None:
    """On all that it does not refuse: the products of what the codes stand for."""
    taken = 0
    for grid in GRIDS.values():
        for shape in SHAPES:
            for group in (None, 16, 20, 32, 64):
                scheme = Scheme(grid, group)
                if not fits(shape, group) or kernel.refuses(scheme, shape, CPU) is not None:
                    continue
                taken += 1
                held = weight(grid, group, shape, torch.float16)
                bias = torch.linspace(-1, 1, shape[0]) if group == 32 else None
                linear, dense = kernel.prepack(held, bias), held.dequantize().double()
                for m in (1, 3, 16):
                    x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m))
                    want = x.double() @ dense.T + (0 if bias is None else bias.double())
                    bound = (x.double().abs() @ dense.abs().T) * 1e-6 + 1e-5
                    if kernel.name in ROUNDING:
                        bound = int8_bound(held, x)
                    error = (linear.matmul(x) - want).abs()
                    assert bool((error <= bound).all()), (str(scheme), shape, m)
    assert taken, "refuses everything"


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["seq2", "int3", "int4", "int8", "uint4", "binary"])
def test_a_token_does_not_depend_on_its_batch(isa: str, name: str, exact: bool) -> None:
    linear = CpuKernel(exact).prepack(weight(GRIDS[name], 64, (80, 320), torch.float16))
    x = torch.randn(200, 320, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([linear.matmul(row[None]) for row in x])
    for m in (2, 3, 4, 5, 8, 9, 16, 17, 200):
        assert torch.equal(linear.matmul(x[:m]), alone[:m]), m


def test_dense_rows_of_every_dtype(isa: str) -> None:
    from qexport.runtime.kernels.cpu import CpuLinear

    x = torch.randn(9, 100, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.randn(37, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
        linear = CpuLinear.dense(rows, torch.ones(37))
        want = x.double() @ rows.double().T + 1
        assert torch.allclose(linear.matmul(x).double(), want, atol=1e-4)
        assert torch.equal(linear.matmul(x)[4:5], linear.matmul(x[4:5]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(isa: str, poison: float) -> None:
    for exact in (True, False):
        linear = CpuKernel(exact).prepack(weight(GRIDS["seq2"], 64, (16, 128), torch.float16))
        for m in (1, 8):
            x = torch.ones(m, 128)
            x[0, 70] = poison
            out = linear.matmul(x)
            assert not out[0].isfinite().any()
            assert out[1:].isfinite().all()


def test_zero_activations_give_zero(isa: str) -> None:
    linear = CpuKernel().prepack(weight(GRIDS["int4"], 64, (16, 128), torch.float16))
    assert torch.equal(linear.matmul(torch.zeros(5, 128)), torch.zeros(5, 16))


def test_the_choice_says_why() -> None:
    chosen = choose(Scheme(GRIDS["seq2"], 64), (64, 64), CPU)
    assert str(chosen) == "cpu"
    chosen = choose(Scheme(GRIDS["seq2"], 16), (64, 64), CPU)
    assert chosen.kernel.name not in ("cpu", "cpu-exact")
    assert "groups of 16 are no multiple of 32" in str(chosen)
    assert choose(Scheme(GRIDS["nf4"], 64), (64, 64), CPU).kernel.name == "reference"
    assert choose(Scheme(GRIDS["seq2"], 64), (64, 64), CPU, "reference").kernel.name == "reference"
    with pytest.raises(UnsupportedError, match="kernel cpu does not take seq2 g16"):
        choose(Scheme(GRIDS["seq2"], 16), (64, 64), CPU, "cpu")
    with pytest.raises(InputError, match="there is no kernel 'fast'; there are cpu, cpu-exact"):
        choose(Scheme(GRIDS["seq2"], 16), (64, 64), CPU, "fast")


def test_the_oracle_dequantizes_and_multiplies() -> None:
    held = weight(GRIDS["uint4"], 32, (8, 64), torch.float16)
    x = torch.randn(3, 64)
    linear = KERNELS["reference"].prepack(held, torch.ones(8))
    assert torch.equal(
        linear.matmul(x), torch.nn.functional.linear(x, held.dequantize(), torch.ones(8))
    )


def test_what_is_refused_is_not_packed() -> None:
    with pytest.raises(ValueError, match="groups of 16"):
        CpuKernel().prepack(weight(GRIDS["int4"], 16, (16, 64), torch.float16))
    assert "not on cuda" in str(
        CpuKernel().refuses(Scheme(GRIDS["int4"], 64), (16, 64), torch.device("cuda"))
    )


def test_codes_need_not_be_contiguous() -> None:
    held = weight(GRIDS["int4"], 32, (64, 64), torch.float32)
    turned = QuantizedTensor(held.codes.T, held.scales, held.scheme)
    x = torch.randn(2, 64)
    found = CpuKernel(exact=True).prepack(turned).matmul(x)
    torch.testing.assert_close(found, x @ turned.dequantize().T, rtol=1e-4, atol=1e-4)


def test_torchs_default_dtype_is_not_ours() -> None:
    held, x = weight(GRIDS["int4"], 32, (48, 64), torch.float32), torch.randn(2, 64)
    linear = CpuKernel(exact=True).prepack(held)
    want = linear.matmul(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(linear.matmul(x), want)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
def test_weights_are_private_memory() -> None:
    """Shared pages are never large ones, and a forked process would write into ours."""
    taken = Arena().take(1 << 20)
    taken.fill_(1)
    begin = taken.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        low, high = (int(part, 16) for part in span.split("-"))
        if low <= begin < high:
            assert permissions == "rw-p"
            return
    pytest.fail("the slab is not mapped")


def test_humming_is_given_the_scales_as_they_are() -> None:
    """In the activations' dtype, where that holds them; not rounded without a word."""
    fine = torch.tensor([1.5, 0.25], dtype=torch.float16)
    assert torch.equal(_exactly(fine, torch.bfloat16).float(), fine.float())
    with pytest.raises(UnsupportedError, match="would round scales of float16 to bfloat16"):
        _exactly(torch.tensor([1.001], dtype=torch.float16), torch.bfloat16)
