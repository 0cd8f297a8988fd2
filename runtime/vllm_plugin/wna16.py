"""compressed-tensors of 2 and 3 bits on CPUs, where vLLM has no kernel: ours, in its list."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from qexport.formats.words import from_words
from qexport.grid import INT2, INT3, INT4, INT8, UINT2, UINT3, UINT4, UINT8, Scheme
from qexport.runtime.kernels.cpu import CpuKernel, CpuLinear
from qexport.runtime.kernels.dispatch import KERNELS
from qexport.tensor import QuantizedTensor

__all__ = ["QexportCpuKernel", "register_kernel"]

_NAMES = {
    **{"uint2b2": INT2, "uint3b4": INT3, "uint4b8": INT4, "uint8b128": INT8},
    **{"uint2": UINT2, "uint3": UINT3, "uint4": UINT4, "uint8": UINT8},
}
# 0.29 knows no asymmetric codes of 2 and 3 bits
_GRIDS = {
    getattr(scalar_types, name): grid
    for name, grid in _NAMES.items()
    if hasattr(scalar_types, name)
}
_CPU = torch.device("cpu")


@lru_cache(maxsize=1)
def register_kernel() -> None:
    """Put our kernel behind those that vLLM has."""
    register_linear_kernel(QexportCpuKernel, PlatformEnum.CPU, "mp")


class QexportCpuKernel(MPLinearKernel):
    """`qexport.runtime.kernels.cpu` for layers whose words lie along their inputs."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if c.weight_type not in _GRIDS:
            return False, f"{c.weight_type} is not one of {[str(kind) for kind in _GRIDS]}"
        if getattr(c, "has_g_idx", False):
            return False, "groups are reordered (g_idx)"
        inputs, out = c.partition_weight_shape
        reason = CpuKernel().refuses(_scheme(c), (out, inputs), _CPU)
        return reason is None, reason

    def process_weights_after_loading(self, layer: Module) -> None:
        """Unpack the words, and prepack the codes."""
        c = self.config
        (inputs, out), scheme = c.partition_weight_shape, _scheme(c)
        words, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        width = scheme.grid.bits
        zeros = None
        if scheme.grid.zeros:
            zero_words = getattr(layer, self.w_zp_name or "").data
            zeros = from_words(zero_words.t().contiguous(), width, out).t().contiguous()
        weight = QuantizedTensor(
            from_words(words.data, width, inputs), scales.data.contiguous(), scheme, zeros
        )
        kernel = KERNELS["cpu-exact" if c.act_type == torch.float32 else "cpu"]
        linear = kernel.prepack(weight)
        assert isinstance(linear, CpuLinear)
        self._linear = linear
        for name in (self.w_s_name, self.w_zp_name):
            if name is not None and getattr(layer, name, None) is not None:
                delattr(layer, name)
        setattr(layer, self.w_q_name, Parameter(self._linear.packed, requires_grad=False))

    def apply_weights(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        packed: Any = getattr(layer, self.w_q_name)
        out: Tensor = torch.ops.qexport.cpu_linear(rows, packed, self._linear.out_features)
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


def _scheme(c: MPLinearLayerConfig) -> Scheme:
    group = None if c.group_size == -1 else c.group_size
    return Scheme(_GRIDS[c.weight_type], group, c.act_type)
