"""Which CUDA kernel: what the weights are, how the work is divided, and the text that says so.

Kernels are templates in runtime/csrc/cuda; a text of a few lines names one instance, and NVRTC
compiles it when it is first wanted.
"""

from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from qexport.grid import Scheme
from qexport.runtime.kernels.cuda_layout import span_inputs
from qexport.runtime.kernels.nvrtc import compile_cubin

__all__ = [
    "DENSE_CHUNKS",
    "DENSE_SHARED",
    "KERNEL",
    "MOST_BITS",
    "Tile",
    "WeightKind",
    "compiled",
    "dense_instance",
    "matmul_instance",
    "text_of",
]

_SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
_SCALES = {
    torch.float16: "Half2Scale",
    torch.bfloat16: "Bfloat2Scale",
    torch.float32: "Float2Scale",
}
_HALVES = {torch.float16: "Half", torch.bfloat16: "Bfloat16"}
_STEP = 64

MOST_BITS = 4  # of a code
KERNEL = "qexport_kernel"  # what profilers show
DENSE_CHUNKS = 4  # that a block of Dequantize takes, a warp each
DENSE_SHARED = DENSE_CHUNKS * 16 * (_STEP + 8) * 2


@dataclass(frozen=True)
class WeightKind:
    """What a kernel has to know of weights.

    bits        of a code, 1 to 4
    twice_zero  twice the zero point that all share; 0 where groups have their own (`zeros`)
    span        inputs that share a scale, 0 for all of a row
    scale       dtype of scales and zero points
    """

    bits: int
    twice_zero: int
    zeros: bool
    span: int
    scale: torch.dtype

    @classmethod
    def of(cls, scheme: Scheme) -> "WeightKind":
        grid = scheme.grid
        twice_zero = 0 if grid.zero is None else int(2 * grid.zero)
        span = span_inputs(scheme.group_size, grid.bits)
        return cls(grid.bits, twice_zero, grid.zero is None, span, scheme.scale_dtype)

    def arguments(self, half: torch.dtype) -> str:
        """The first arguments of every kernel's template."""
        scale = f"qx::{_SCALES[self.scale]}"
        zeros = str(self.zeros).lower()
        return f"qx::{_HALVES[half]}, {self.bits}, {self.twice_zero}, {zeros}, {scale}, {self.span}"


@dataclass(frozen=True)
class Tile:
    """How a block of threads works; matmul.cuh says what the numbers are.

    tiles     of 16 outputs for each warp; columns: of 8 tokens
    warps_n   beside each other along outputs; warps_k: that divide the inputs
    stages    steps of 64 inputs of tokens that the ring holds
    ahead     chunks of weights that are on their way
    blocks    that a multiprocessor is to hold: registers are shared out so
    wgmma     sm_90a's instructions; warps_n is then a multiple of 4, columns 2, 4, 8 or 16
    """

    tiles: int
    columns: int
    warps_n: int
    warps_k: int
    stages: int
    ahead: int
    blocks: int = 1
    wgmma: bool = False

    @property
    def outputs(self) -> int:
        return 16 * self.tiles * self.warps_n

    @property
    def tokens(self) -> int:
        return 8 * self.columns

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_k

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the ring, and later the sums."""
        ring = self.stages * self.tokens * _STEP * 2
        return self.warps_k * max(ring, self.tokens * (self.outputs + 4) * 4)


def matmul_instance(kind: WeightKind, tile: Tile, half: torch.dtype) -> str:
    """The C++ type of a matmul kernel for activations of dtype `half`."""
    numbers = ", ".join(map(str, astuple(tile)[:-2]))
    return f"qx::Matmul<{kind.arguments(half)}, {numbers}, {str(tile.wgmma).lower()}>"


def dense_instance(kind: WeightKind, half: torch.dtype) -> str:
    """The C++ type of the kernel that makes a dense matrix of dtype `half`."""
    return f"qx::Dequantize<{kind.arguments(half)}>"


def text_of(
    header: str, problem: str, instance: str, threads: int, shared: int, blocks: int = 1
) -> str:
    """The source of a kernel `KERNEL` that runs one instance on a `problem`."""
    return (
        f'#include "{header}"\n'
        f'static_assert({instance}::kShared == {shared}, "bytes that a launch asks for");\n'
        f'extern "C" __global__ __launch_bounds__({threads}, {blocks}) void\n'
        f"{KERNEL}(const __grid_constant__ {problem} problem) {{\n"
        f"    {instance}::run(problem);\n}}\n"
    )


def compiled(text: str, architecture: str) -> bytes:
    """The cubin of a text that includes kernels. Raises UnsupportedError without NVRTC."""
    return compile_cubin("kernel.cu", {**_headers(), "kernel.cu": text}, architecture)


@lru_cache(maxsize=1)
def _headers() -> dict[str, str]:
    return {path.name: path.read_text() for path in _SOURCES.glob("*.cuh")}
