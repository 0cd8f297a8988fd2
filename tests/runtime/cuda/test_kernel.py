"""The CUDA kernel behind the protocol, its launches emulated: what Python does around kernels."""

import ctypes
import re
from pathlib import Path
from zlib import crc32

import pytest
import torch
from torch import Tensor

from qexport.grid import GRIDS, Scheme
from qexport.runtime.kernels import cuda_matmul, cuda_tiles
from qexport.runtime.kernels.cuda import CudaKernel
from qexport.runtime.kernels.cuda_matmul import PackedWeight
from qexport.runtime.kernels.cuda_source import Tile, WeightKind
from qexport.tensor import QuantizedTensor
from tests.runtime.cuda.emulated import COMPILER, compile_host, launch
from tests.runtime.cuda.test_matmul import check, random_weight

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
_TEXT = re.compile(r'#include "(.*)"\n(?s:.*)__grid_constant__ (.*) problem\) {\n    (.*)::run')


class Launches:
    """Stands in for `cuda_launch.launch`; remembers what was launched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[str, ctypes.CDLL] = {}
        self.grids: list[tuple[int, int, int]] = []
        self.texts: list[str] = []

    def __call__(
        self,
        text: str,
        problem: ctypes.Structure,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        device: torch.device,
    ) -> None:
        if text not in self._libraries:
            found = _TEXT.match(text)
            assert found is not None, text
            header, kind, instance = found.groups()
            folder = self._folder / str(crc32(text.encode()))
            folder.mkdir()
            self._libraries[text] = compile_host(folder, header, kind, [instance])
        self.grids.append(grid)
        self.texts.append(text)
        launch(self._libraries[text], 0, problem, grid, threads, shared, len(self.grids), None)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(tmp_path_factory.mktemp("launches"))


@pytest.fixture
def gpu(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """A machine of 4 multiprocessors."""
    monkeypatch.setattr(cuda_matmul, "launch", launches)
    monkeypatch.setattr(cuda_matmul, "architecture", lambda _: "sm_90a")
    monkeypatch.setattr(cuda_matmul, "_processors", lambda _: 4)
    monkeypatch.setattr(CudaKernel, "refuses", lambda *_: None)
    launches.grids.clear()
    launches.texts.clear()
    return launches


def make(
    grid: str, group: int | None, shape: tuple[int, int], dtype: torch.dtype
) -> QuantizedTensor:
    tile = Tile(1, 1, 1, 1, 2, 1)
    return random_weight((grid, group, torch.float16, tile, dtype), shape)


@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 40, 70])
def test_linear(gpu: Launches, tokens: int) -> None:
    weight = make("seq2", 128, (70, 4096), torch.bfloat16)
    bias = torch.randn(70)
    linear = CudaKernel().prepack(weight, bias)
    x = torch.randn(tokens, 4096).to(torch.bfloat16)
    found = linear.matmul(x)
    assert found.shape == (tokens, 70)
    check(found, x, weight, bias)
    if tokens in (1, 5):
        assert gpu.grids[0][2] > 1, "few blocks divide the inputs among them"
    assert all("true>::run" in text for text in gpu.texts) == (tokens > 16 or tokens == 0)


@pytest.mark.parametrize("inputs", [100, 31])
def test_rows_that_are_not_whole_words(gpu: Launches, inputs: int) -> None:
    weight = make("int3", None, (9, inputs), torch.float16)
    x = torch.randn(3, inputs).half()
    check(CudaKernel().prepack(weight).matmul(x), x, weight)


def test_rows_that_are_not_aligned(gpu: Launches) -> None:
    weight = make("int4", 32, (9, 64), torch.float16)
    linear = CudaKernel().prepack(weight)
    wide = torch.randn(3, 131).half()
    for x in (wide[:, 3:67], wide[:, 1:129:2]):
        check(linear.matmul(x), x, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("grid", "group"),
    [("binary", 32), ("seq2", 128), ("ternary", None), ("int3", 64), ("int4", 96), ("uint3", 32)],
)
def test_dense_weights_are_the_references(
    gpu: Launches, grid: str, group: int | None, dtype: torch.dtype
) -> None:
    """Bit for bit what `dequantize` gives, which is the only one there is."""
    inputs = 3 * (group or 136)
    weight = make(grid, group, (45, inputs), dtype)
    packed = PackedWeight.of(weight, None)
    want = weight.dequantize(dtype)
    for first, end in ((0, 45), (16, 40)):
        found = cuda_matmul.dequantize(packed, (first, end), inputs, dtype)
        assert torch.equal(found, want[first:end])


def test_many_tokens_go_to_cublas(gpu: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make("uint4", 32, (600, 64), torch.bfloat16)
    bias = torch.randn(600).to(torch.bfloat16).float()
    monkeypatch.setattr(cuda_matmul, "dense_from", lambda _: 30)
    monkeypatch.setattr(cuda_matmul, "_DENSE_BYTES", 256 * 64 * 2)
    x = torch.randn(30, 64).to(torch.bfloat16)
    found = CudaKernel().prepack(weight, bias).matmul(x)
    want = torch.nn.functional.linear(x, weight.dequantize(torch.bfloat16), bias.bfloat16())
    torch.testing.assert_close(found, want)
    assert ["dequantize" in text for text in gpu.texts] == [True] * 3


def test_inputs_are_divided_only_as_far_as_it_pays() -> None:
    tile = Tile(4, 1, 1, 8, 4, 1, 2)
    assert cuda_tiles.splits(tile, 2, 1, 64 * 264, 64, 132) == 1  # every place is taken
    assert cuda_tiles.splits(tile, 2, 1, 64 * 132, 64, 132) == 2
    assert cuda_tiles.splits(tile, 2, 1, 64, 8, 132) == 1  # a chunk for each warp
    assert cuda_tiles.splits(tile, 2, 1, 64, 1024, 132) == 16
    wide = Tile(1, 16, 8, 1, 4, 1, wgmma=True)
    for tokens, outputs in ((64, 28672), (256, 28672), (256, 6144)):
        assert cuda_tiles.splits(wide, 2, tokens, outputs, 32, 132) == 1  # sums weigh more


def test_tiles_are_the_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "tiles.json"
    measured = '{"tiles": 1, "columns": 1, "warps_n": 2, "warps_k": 4, "stages": 6, "ahead": 2}'
    table.write_text('{"sm_90a": {"dense": 700, "tiles": {"2/128": {"4": ' + measured + "}}}}")
    monkeypatch.setattr(cuda_tiles, "TABLE", table)
    cuda_tiles.tile_for.cache_clear()
    cuda_tiles.forget_table()
    try:
        kind = WeightKind.of(Scheme(GRIDS["seq2"], 128))
        assert cuda_tiles.tile_for("sm_90a", kind, 3) == Tile(1, 1, 2, 4, 6, 2)
        assert cuda_tiles.tile_for("sm_90a", kind, 2) == cuda_tiles.tile_for("sm_80", kind, 2)
        assert cuda_tiles.dense_from("sm_90a") == 700
        assert cuda_tiles.dense_from("sm_80") == 513
    finally:
        cuda_tiles.tile_for.cache_clear()
        cuda_tiles.forget_table()


def test_the_operator_is_one_for_torch(gpu: Launches) -> None:
    """Its fake gives the shape, so that torch.compile sees through it, and nothing is written."""
    weight = make("seq2", 128, (70, 4096), torch.bfloat16)
    linear = CudaKernel().prepack(weight)
    x = torch.randn(5, 4096).to(torch.bfloat16)
    w = linear.weight
    arguments = (x, w.words, w.scales, w.zeros, w.bias, w.arrived, 70, 2, 3, 128)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.qexport.cuda_matmul.default, arguments, test_utils=tests)

    def twice(x: Tensor) -> Tensor:
        return linear.matmul(x) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), twice(x))


def test_refusals() -> None:
    kernel, cpu = CudaKernel(), torch.device("cpu")
    assert kernel.refuses(Scheme(GRIDS["seq2"]), (16, 16), cpu) == (
        "it runs on NVIDIA GPUs, not on cpu"
    )
    gpu = torch.device("cuda")
    assert "5 bits" in str(kernel.refuses(Scheme(GRIDS["int5"]), (16, 16), gpu))
    assert "groups of 24" in str(kernel.refuses(Scheme(GRIDS["int4"], 24), (16, 48), gpu))
