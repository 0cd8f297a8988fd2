"""The kernels of matmul.cuh, emulated: every grid, odd shapes, splits, any order of threads."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import pytest
import torch
from torch import Tensor

from qexport.grid import GRIDS, Scheme
from qexport.runtime.kernels.cuda_launch import MatmulProblem
from qexport.runtime.kernels.cuda_layout import pack_codes, pack_scales
from qexport.runtime.kernels.cuda_source import Tile, WeightKind, matmul_instance
from qexport.tensor import QuantizedTensor
from tests.runtime.cuda.emulated import COMPILER, SOURCES, compile_host, launch

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
FEW = Tile(tiles=2, columns=1, warps_n=1, warps_k=2, stages=3, ahead=1)
WIDE = Tile(tiles=1, columns=2, warps_n=2, warps_k=2, stages=4, ahead=2)
MANY = Tile(tiles=2, columns=3, warps_n=2, warps_k=1, stages=2, ahead=1)
WARPGROUP = Tile(tiles=1, columns=4, warps_n=4, warps_k=2, stages=4, ahead=1, wgmma=True)
TALL = Tile(tiles=2, columns=2, warps_n=4, warps_k=1, stages=3, ahead=1, wgmma=True)
HALVES = (torch.float16, torch.bfloat16)
# grid, group, dtype of scales, tile, dtype of activations
Case = tuple[str, int | None, torch.dtype, Tile, torch.dtype]
CASES: list[Case] = [
    (grid, group, (torch.float16, torch.bfloat16, torch.float32)[at % 3], tile, HALVES[at % 2])
    for at, (grid, group, tile) in enumerate(
        [
            *((grid, 32, FEW) for grid in ("binary", "ternary", "seq2", "int2", "int3", "int4")),
            *((grid, 128, WIDE) for grid in ("seq2", "int3", "int4", "uint2", "uint3", "uint4")),
            *((grid, None, MANY) for grid in ("binary", "seq2", "int3", "int4", "uint3")),
            *((grid, 64, MANY) for grid in ("seq2", "int3", "uint4")),
            *((grid, 256, FEW) for grid in ("int2", "uint3", "int4")),
            *((grid, 96, WIDE) for grid in ("int2", "uint3", "int4")),
            *((grid, 16, FEW) for grid in ("binary", "uint2", "int3")),
            *((grid, 128, WARPGROUP) for grid in ("binary", "seq2", "int3", "int4", "uint3")),
            *((grid, 32, TALL) for grid in ("ternary", "seq2", "uint4")),
            *((grid, None, TALL) for grid in ("seq2", "int3", "uint2")),
            *((grid, 96, WARPGROUP) for grid in ("int2", "uint3")),
        ]
    )
]


def random_weight(case: Case, shape: tuple[int, int]) -> QuantizedTensor:
    grid, group, dtype, _, _ = case
    generator = torch.Generator().manual_seed(crc32(f"{case} {shape}".encode()))
    scheme = Scheme(GRIDS[grid], group, dtype)
    groups = (shape[0], scheme.groups(shape[1]))
    codes = torch.randint(0, scheme.grid.levels, shape, dtype=torch.uint8, generator=generator)
    scales = (torch.rand(groups, generator=generator) * 0.1 + 0.01).to(dtype)
    zeros = None
    if scheme.grid.zeros:
        zeros = torch.randint(0, scheme.grid.levels, groups, dtype=torch.uint8, generator=generator)
    return QuantizedTensor(codes, scales, scheme, zeros)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    instances = [
        matmul_instance(WeightKind.of(Scheme(GRIDS[grid], group, dtype)), tile, half)
        for grid, group, dtype, tile, half in CASES
    ]
    return compile_host(tmp_path_factory.mktemp("matmul"), "matmul.cuh", "qx::Problem", instances)


def multiply(
    kernels: ctypes.CDLL,
    case: Case,
    x: Tensor,
    weight: QuantizedTensor,
    *,
    bias: Tensor | None = None,
    splits: int = 1,
    seed: int = 0,
    index: int | None = None,
) -> Tensor:
    tile = case[3]
    kind = WeightKind.of(weight.scheme)
    (tokens, inputs), outputs = x.shape, weight.shape[0]
    group = weight.scheme.group_size
    words = pack_codes(weight.codes, kind.bits)
    scales = pack_scales(weight.scales, inputs, group, kind.bits)
    zeros = weight.zeros
    if zeros is not None:
        zeros = pack_scales(zeros.to(weight.scales.dtype), inputs, group, kind.bits)
    out = torch.full((tokens, outputs), torch.nan, dtype=x.dtype)
    partial = torch.full((splits, tokens, outputs), torch.nan)
    grid = (-(-outputs // tile.outputs), -(-tokens // tile.tokens), splits)
    arrived = torch.zeros(grid[0] * grid[1], dtype=torch.int32)
    problem = MatmulProblem(
        x.data_ptr(),
        words.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr() if zeros is not None else None,
        bias.data_ptr() if bias is not None else None,
        out.data_ptr(),
        partial.data_ptr(),
        arrived.data_ptr(),
        *(tokens, outputs, inputs, x.stride(0), *words.shape[:2]),
    )
    at = CASES.index(case) if index is None else index
    launch(kernels, at, problem, grid, tile.threads, tile.shared, seed, (x, words))
    assert not arrived.any(), "the next call would find a count"
    return out


def check(out: Tensor, x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> None:
    """Sums in float32 rounded once: half a unit of the result, and the sum's own error."""
    wide = x.double()
    want = wide @ weight.dequantize().double().T + (0 if bias is None else bias.double())
    size = wide.abs() @ weight.dequantize().double().abs().T + want.abs()
    bound = want.abs() * torch.finfo(x.dtype).eps / 2 + size * 2**-20 + 1e-7
    assert not out.isnan().any()
    assert ((out.double() - want).abs() <= bound).all()


def shapes(case: Case) -> Sequence[tuple[int, int, int]]:
    """Tokens, outputs, inputs: less than a tile, and more than one that is not whole."""
    group = case[1] or 8
    tile = case[3]
    return (1, 7, group), (tile.tokens + 3, tile.outputs + 18, group * -(-712 // group))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{str(c[4])[6:]}")
def test_products(kernels: ctypes.CDLL, case: Case) -> None:
    for tokens, outputs, inputs in shapes(case):
        weight = random_weight(case, (outputs, inputs))
        x = torch.randn(tokens, inputs + 8, generator=torch.Generator().manual_seed(1))
        x = x.to(case[4])[:, :inputs]  # rows that do not follow each other
        check(multiply(kernels, case, x, weight), x, weight)


@pytest.mark.parametrize("case", CASES[1::6], ids=lambda c: f"{c[0]}-{c[1]}")
def test_splits_with_a_bias_in_any_order(kernels: ctypes.CDLL, case: Case) -> None:
    weight = random_weight(case, (40, case[1] * -(-1024 // case[1]) if case[1] else 1024))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, weight.shape[1], generator=generator).to(case[4])
    bias = torch.randn(40, generator=generator)
    for splits in (2, 3, 7):
        found = [
            multiply(kernels, case, x, weight, bias=bias, splits=splits, seed=seed)
            for seed in range(3)
        ]
        check(found[0], x, weight, bias)
        assert all(torch.equal(found[0], again) for again in found[1:])


def test_tokens_beyond_the_last_are_not_read(kernels: ctypes.CDLL) -> None:
    """NaN beside the tokens and inputs that count changes nothing."""
    case = CASES[2]
    weight = random_weight(case, (24, 96))
    x = torch.full((5, 128), torch.nan, dtype=case[4])
    x[:3, :96] = torch.randn(3, 96)
    check(multiply(kernels, case, x[:3, :96], weight), x[:3, :96], weight)


@pytest.mark.parametrize(
    ("line", "tile", "group"),
    [
        ("copies_wait<STAGES - kBehind - 1>();", FEW, 128),
        ("group_sync(warp_k, kBeside);", MANY, 128),
        ("if constexpr (WGMMA) wgmma_publish();", WARPGROUP, 128),
        ("wgmma_wait<1>();", WARPGROUP, None),
        ("if constexpr (WGMMA) wgmma_wait<0>();", WARPGROUP, 128),
    ],
)
def test_the_emulator_sees_what_is_missing(
    line: str, tile: Tile, group: int | None, tmp_path: Path
) -> None:
    """Without one of its waits a kernel fails here: the tests above can."""
    for path in SOURCES.glob("*.cuh"):
        text = path.read_text()
        assert path.name != "matmul.cuh" or line in text
        (tmp_path / path.name).write_text(text.replace(line, ""))
    case = ("seq2", group, torch.float16, tile, torch.float16)
    instance = matmul_instance(WeightKind.of(Scheme(GRIDS["seq2"], group)), tile, case[4])
    folder = tmp_path / "build"
    folder.mkdir()
    broken = compile_host(folder, "matmul.cuh", "qx::Problem", [instance], tmp_path)
    weight = random_weight(case, (24, 1024))
    x = torch.randn(19, 1024, generator=torch.Generator().manual_seed(3)).to(case[4])
    with pytest.raises(AssertionError):
        check(multiply(broken, case, x, weight, index=0), x, weight)
