"""The Triton kernel behind the protocol: the fallback for GPUs, and for Triton's interpreter."""

import importlib.util
import math
import os

import torch
from torch import Tensor

from qexport.grid import Scheme
from qexport.runtime.kernels.base import Kernel, Linear
from qexport.tensor import QuantizedTensor

__all__ = ["TritonKernel"]

# Planes of a code's bits, the lowest first; wider codes take a byte.
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}
_FEW = 16  # tokens, up to which the inputs are split among programs
_TILE = 64  # outputs of a program
_MOST_SPLITS = 8


class _TritonLinear(Linear):
    def __init__(self, weight: QuantizedTensor, bias: Tensor | None) -> None:
        from qexport.runtime.kernels.triton_matmul import FIELD, matmul, pack_plane

        self._matmul = matmul
        self.out_features, self.in_features = weight.shape
        scheme = weight.scheme
        planes = _PLANES.get(scheme.grid.bits, (8,))
        fields = 32 // min(planes)
        self._chunk = fields * FIELD
        self._chunks = -(-self.in_features // self._chunk)
        padding = self._chunks * self._chunk - self.in_features
        codes = torch.nn.functional.pad(weight.codes, (0, padding))
        self._low = pack_plane(codes & ((1 << planes[0]) - 1), planes[0], fields)
        self._high = pack_plane(codes >> planes[0], planes[1], fields) if planes[1:] else None
        self._bits = planes[0], sum(planes[1:])
        self._group = scheme.group_size or self._chunks * self._chunk
        self._span = math.gcd(self._group, self._chunk)
        self._scales = self._in_groups(weight.scales)
        self._zeros = None if weight.zeros is None else self._in_groups(weight.zeros)
        self._zero = scheme.grid.middle
        self._bias = bias

    def _in_groups(self, values: Tensor) -> Tensor:
        """[out, groups] as [groups, out], for all inputs of the last chunk."""
        groups = -(-self._chunks * self._chunk // self._group)
        return torch.nn.functional.pad(values, (0, groups - values.shape[1])).T.contiguous()

    def matmul(self, x: Tensor) -> Tensor:
        made: Tensor = self._matmul(
            *(x, self._low, self._high, self._scales, self._zeros, self._bias),
            *(self._group, self._zero, *self._bits, self._span, self._splits(x)),
        )
        return made

    def _splits(self, x: Tensor) -> int:
        """Parts of the inputs, so that a few tokens keep every multiprocessor busy."""
        if len(x) > _FEW:
            return 1
        programs = -(-self.out_features // _TILE)
        wanted = -(-2 * _processors(x.device) // programs)
        return max(1, min(wanted, self._chunks, _MOST_SPLITS))


class TritonKernel(Kernel):
    """Every uniform grid up to 8 bits in groups of a multiple of 16, or per channel.

    Activations are float32, float16 or bfloat16; `code - zero` is exact in each, products are
    summed in float32 within a group, and a group's scale is applied to its sum. The sums of a
    token run in an order that does not change from call to call.
    """

    name = "triton"

    def refuses_scheme(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not scheme.grid.uniform:
            return f"{scheme.grid.name} is not a uniform grid"
        if scheme.group_size is not None and scheme.group_size % 16:
            return f"groups of {scheme.group_size} are no multiple of 16"
        return None

    def refuses(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it runs on GPUs, not on {device.type}"
        return self.refuses_scheme(scheme, shape)

    def prepack(self, weight: QuantizedTensor, bias: Tensor | None = None) -> Linear:
        self.check(weight)
        return _TritonLinear(weight, bias)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
