"""The CUDA C++ kernels behind the protocol."""

import torch
from torch import Tensor

from qexport.errors import UnsupportedError
from qexport.grid import Scheme
from qexport.runtime.kernels.base import Kernel, Linear
from qexport.runtime.kernels.cuda_layout import span_inputs
from qexport.runtime.kernels.cuda_matmul import PackedWeight, matmul
from qexport.runtime.kernels.cuda_source import MOST_BITS
from qexport.runtime.kernels.nvrtc import architectures
from qexport.tensor import QuantizedTensor

__all__ = ["CudaKernel", "CudaLinear"]

_OLDEST = (8, 0)


class CudaLinear(Linear):
    """A packed weight, and the operator that multiplies with it."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight = PackedWeight.of(weight, bias)

    def matmul(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight)


class CudaKernel(Kernel):
    """Uniform grids of 1 to 4 bits, in groups of a multiple of 16 or per channel.

    Activations are float16 or bfloat16. `code - zero` is exact in both; a group's products are
    summed in float32 and meet its scale there, in an order that does not change from call to call.
    Zero points that groups have for themselves are subtracted from such sums, times the sum of x.
    """

    name = "cuda"
    capability = 80
    activations = (torch.float16, torch.bfloat16)

    def refuses_scheme(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not scheme.grid.uniform:
            return f"{scheme.grid.name} is not a uniform grid"
        if scheme.grid.bits > MOST_BITS:
            return f"codes of {scheme.grid.bits} bits are more than {MOST_BITS}"
        if span_inputs(scheme.group_size, scheme.grid.bits) % 16:
            return f"groups of {scheme.group_size} are no multiple of 16"
        return None

    def refuses(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it runs on NVIDIA GPUs, not on {device.type}"
        reason = self.refuses_scheme(scheme, shape)
        if reason is not None:
            return reason
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            return f"compute capability {'.'.join(map(str, capability))} is below 8.0"
        try:
            known = architectures()
        except UnsupportedError as error:
            return str(error).rstrip(".")
        if capability[0] * 10 + capability[1] not in known:
            return f"this NVRTC does not know compute capability {'.'.join(map(str, capability))}"
        return None

    def prepack(self, weight: QuantizedTensor, bias: Tensor | None = None) -> CudaLinear:
        self.check(weight)
        return CudaLinear(weight, bias)
