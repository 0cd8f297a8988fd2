"""The CUDA kernels on a device: errors, repeatability, graphs, torch.compile, the sanitizer."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qexport.grid import GRIDS, Scheme
from qexport.runtime.cuda_model import CudaDecoder
from qexport.runtime.device_sampler import Draw, choose
from qexport.runtime.kernels.cuda import CudaKernel
from qexport.runtime.kernels.cuda_launch import architecture
from qexport.runtime.kernels.cuda_matmul import (
    COUNTERS,
    PackedWeight,
    dense_text,
    dequantize,
    matmul_text,
)
from qexport.runtime.kernels.cuda_source import KERNEL, WeightKind, compiled
from qexport.runtime.kernels.cuda_tiles import BUCKETS, tile_for
from qexport.runtime.kernels.triton import TritonKernel
from qexport.runtime.model import Span, TorchDecoder
from qexport.runtime.sampler import Sampler, Sampling
from qexport.tensor import QuantizedTensor
from tests.runtime.families import make
from tests.runtime.test_decoder import config_of, quantized

pytestmark = pytest.mark.gpu
HALVES = (torch.float16, torch.bfloat16)
GROUPS = (32, 64, 128, None)
SCHEMES = [
    *(
        (name, group)
        for name in ("binary", "ternary", "seq2", "int2", "int3", "int4")
        for group in GROUPS
    ),
    *((name, group) for name in ("uint2", "uint3", "uint4") for group in (32, 128)),
]
# outputs and inputs of the layers of Llama-3-8B, Qwen3-0.6B, MiniCPM4-0.5B and SmolLM2-135M
LARGE = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
SMALL = (
    *((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
    *((1280, 1024), (1024, 1024), (8192, 1024), (1024, 4096)),
    *((960, 576), (576, 576), (3072, 576), (576, 1536)),
)
TOKENS = (1, 2, 3, 4, 8, 16, 17, 32, 64, 128, 256, 512, 2048, 4096)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def random_weight(name: str, group: int | None, shape: tuple[int, int]) -> QuantizedTensor:
    generator = torch.Generator("cuda").manual_seed(shape[0] * 31 + shape[1])
    options = {"device": "cuda", "generator": generator}
    scheme = Scheme(GRIDS[name], group)
    groups, levels = (shape[0], scheme.groups(shape[1])), scheme.grid.levels
    codes = torch.randint(0, levels, shape, dtype=torch.uint8, **options)  # type: ignore[call-overload]
    scales = (torch.rand(groups, **options) * 0.05 + 0.005).half()  # type: ignore[call-overload]
    zeros = None
    if scheme.grid.zeros:
        zeros = torch.randint(0, levels, groups, dtype=torch.uint8, **options)  # type: ignore[call-overload]
    return QuantizedTensor(codes, scales, scheme, zeros)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Everything that is needed is compiled at once, by all cores."""
    machine = architecture(device())
    kinds = {WeightKind.of(Scheme(GRIDS[name], group)) for name, group in SCHEMES}
    texts = {
        matmul_text(kind, tile_for(machine, kind, tokens), half)
        for kind in kinds
        for tokens in BUCKETS
        for half in HALVES
    } | {dense_text(kind, half) for kind in kinds for half in HALVES}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda text: compiled(text, machine), texts))


def error(found: Tensor, want: Tensor) -> float:
    assert not found.isnan().any()
    return float((found.double() - want).norm() / want.norm())


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize(("name", "group"), SCHEMES)
def test_error_is_no_larger_than_cublas(name: str, group: int | None, half: torch.dtype) -> None:
    """Against float64; cuBLAS multiplies the same weights, rounded to half precision."""
    shapes = (
        *SMALL,
        *(LARGE if (name, group) in (("seq2", 128), ("int3", 128), ("int4", 128)) else LARGE[1:2]),
    )
    for shape in shapes:
        weight = random_weight(name, group, shape)
        linear = CudaKernel().prepack(weight)
        exact, rounded = weight.dequantize().double(), weight.dequantize(half)
        x = torch.randn(max(TOKENS), shape[1], device="cuda").to(half)
        for tokens in TOKENS:
            part = x[:tokens]
            want = part.double() @ exact.T
            allowed = error(torch.nn.functional.linear(part, rounded), want)
            found = error(linear.matmul(part), want)
            assert found <= allowed * 1.02 + torch.finfo(half).eps / 8, (
                shape,
                tokens,
                found,
                allowed,
            )


@pytest.mark.parametrize("tokens", [1, 8, 16, 40, 300, 700])
def test_a_hundred_runs_are_one(tokens: int) -> None:
    weight = random_weight("seq2", 128, (4096, 4096))
    linear = CudaKernel().prepack(weight)
    x = torch.randn(tokens, 4096, device="cuda").bfloat16()
    first = linear.matmul(x)
    assert all(torch.equal(linear.matmul(x), first) for _ in range(100))


@pytest.mark.parametrize("name", ["seq2", "int3", "int4", "uint4"])
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_dense_weights_are_the_references(name: str, half: torch.dtype) -> None:
    weight = random_weight(name, 64, (560, 1088))
    found = dequantize(PackedWeight.of(weight, None), (0, 560), 1088, half)
    assert torch.equal(found, weight.dequantize(half))


@pytest.mark.parametrize("shape", [(7, 31), (100, 1000), (1030, 200)])
@pytest.mark.parametrize("tokens", [1, 9, 33])
def test_odd_shapes_with_a_bias(shape: tuple[int, int], tokens: int) -> None:
    weight = random_weight("seq2", None, shape)
    bias = torch.randn(shape[0], device="cuda")
    x = torch.randn(tokens, shape[1], device="cuda").half()
    want = x.double() @ weight.dequantize().double().T + bias.double()
    for kernel in (CudaKernel(), TritonKernel()):
        assert error(kernel.prepack(weight, bias).matmul(x), want) < 1e-3


def test_graphs_and_compile() -> None:
    weight = random_weight("seq2", 128, (4096, 4096))
    linear = CudaKernel().prepack(weight)
    x = torch.randn(4, 4096, device="cuda").half()
    want = linear.matmul(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = linear.matmul(x)
    for _ in range(3):
        found.fill_(torch.nan)
        graph.replay()
        assert torch.equal(found, want)
    compiled_linear = torch.compile(lambda x: linear.matmul(x) + 1, fullgraph=True)
    torch.testing.assert_close(compiled_linear(x), want + 1)


_SANITIZED = """
import torch
from tests.runtime.cuda.test_gpu import CudaKernel, random_weight
cases = ("seq2", None, (200, 1000)), ("int3", 32, (72, 320)), ("uint4", 64, (130, 448))
for name, group, shape in cases:
    weight = random_weight(name, group, shape)
    linear = CudaKernel().prepack(weight)
    for tokens in (1, 9, 20, 70, 600):
        linear.matmul(torch.randn(tokens, shape[1], device="cuda").half())
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer here")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool: str) -> None:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    # only our kernels: what cuBLAS does is not ours
    only = ["--kernel-name", f"kernel_name={KERNEL}"]
    done = subprocess.run(
        [*command, *only, sys.executable, "-c", _SANITIZED],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        # each tensor in memory of its own: what reads beyond one is seen
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_counters_are_enough() -> None:
    assert 2 * torch.cuda.get_device_properties(device()).multi_processor_count <= COUNTERS


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_steps_are_graphs(family: str, tmp_path: Path) -> None:
    """Tokens of graphs, one at a time and in batches, are those of torch without any."""
    checkpoint = quantized(make(tmp_path, family), "seq2", 32)
    options = {"slots": 5, "context": 128, "device": device(), "dtype": torch.float16}
    plain = TorchDecoder(checkpoint, config_of(checkpoint), **options)  # type: ignore[arg-type]
    graphs = CudaDecoder(checkpoint, config_of(checkpoint), **options)  # type: ignore[arg-type]
    assert graphs.kernels == "cuda"
    prompt = [Span(slot, 0, list(range(3 + slot)), 3 + slot) for slot in range(5)]
    for decoder in (plain, graphs):
        decoder.forward(prompt)
    for step in range(20):
        for batch in ([0], [1, 2], [3, 0, 1, 2, 4]):
            spans = [Span(slot, 3 + slot + step, [40 + slot], 4 + slot + step) for slot in batch]
            want = plain.forward(spans)
            torch.testing.assert_close(graphs.forward(spans), want, atol=2e-2, rtol=2e-2)
            first = graphs.choose(spans, [Draw()] * len(batch))
            assert first == graphs.choose(spans, [Draw()] * len(batch))
            rows = torch.arange(len(batch))
            assert (want.amax(-1) - want[rows, first] < 5e-2).all()


def test_tokens_are_the_samplers() -> None:
    """Drawn on the device as on the host, seed for seed."""
    logits = torch.randn(32, 5000) * 3
    options = [
        Sampling(temperature=1.0, top_k=50 * (i % 2), top_p=0.9 if i % 3 else 1.0, seed=i)
        for i in range(32)
    ]
    rows = zip(options, logits, strict=True)
    want = [Sampler(sampling, []).choose(row.numpy())[0] for sampling, row in rows]
    draws = [Sampler(sampling, []).draw() for sampling in options]
    table = torch.tensor([draw.row(5000) for draw in draws], dtype=torch.float64).T
    assert choose(logits.cuda(), table.cuda(), 2).tolist() == want


def test_more_sequences_than_a_graph_has(tmp_path: Path) -> None:
    """A second batch of one size does not overwrite the first one's logits."""
    checkpoint = make(tmp_path, "smollm")
    options = {"slots": 130, "context": 32, "device": device(), "dtype": torch.float16}
    decoder = CudaDecoder(checkpoint, config_of(checkpoint), **options)  # type: ignore[arg-type]
    spans = [Span(slot, 0, [slot], 1) for slot in range(130)]
    together = decoder.forward(spans)
    alone = torch.cat([decoder.forward([span]) for span in spans])
    torch.testing.assert_close(together, alone, atol=2e-2, rtol=2e-2)
