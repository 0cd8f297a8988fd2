"""The CPU kernel: packed codes against int8 activations, or against float32 ones exactly."""

from ctypes import byref, c_void_p
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from qexport.grid import Scheme
from qexport.runtime.kernels.base import Kernel, Linear
from qexport.runtime.kernels.cpu_library import (
    DTYPES,
    CpuLinearStruct,
    default_context,
    library,
    pointer,
)
from qexport.runtime.kernels.memory import Arena
from qexport.tensor import QuantizedTensor

__all__ = ["CpuKernel", "CpuLinear"]

_WIDTHS = {1: 1, 2: 2, 3: 3, 4: 4, 8: 8, 5: 8, 6: 8}  # of codes: of the packed ones
_ACTIVATION_GROUPS = (128, 96, 64, 32)
_BLOCK = 32  # rows, see layout.cpp
_PAD = 32  # inputs


_BY_ADDRESS: "WeakValueDictionary[int, CpuLinear]" = WeakValueDictionary()


@torch.library.custom_op("qexport::cpu_linear", mutates_args=())
def _cpu_linear(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """`CpuLinear.matmul` of the one whose memory `packed` is, for graphs that torch compiles."""
    return _BY_ADDRESS[packed.data_ptr()].matmul(x)


@_cpu_linear.register_fake
def _(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


class CpuLinear(Linear):
    """A packed or dense weight in memory that C++ reads; `struct` points into it.

    packed  that memory; the operator `qexport::cpu_linear` finds a prepacked one's rest by it
    """

    def __init__(self, struct: CpuLinearStruct, keep: list[Tensor], exact: bool) -> None:
        self.struct = struct
        self.out_features, self.in_features = struct.n, struct.k
        self.packed = keep[0]
        self._keep = keep
        self._exact = exact

    def matmul(self, x: Tensor) -> Tensor:
        kernels = library()
        assert kernels is not None
        rows = x.float().contiguous()
        out = torch.empty(len(rows), self.out_features, dtype=torch.float32, device="cpu")
        kernels.qx_linear_forward(
            *(default_context().handle, byref(self.struct), pointer(rows), len(rows)),
            *(pointer(out), self.out_features, self._exact, False, 1.0),
        )
        return out.to(x.dtype)

    @classmethod
    def dense(cls, weight: Tensor, bias: Tensor | None = None) -> "CpuLinear":
        """Rows [out, in] of float32, bfloat16 or float16, used where they lie."""
        out, inputs = weight.shape
        kept = _Kept()
        struct = CpuLinearStruct(0, DTYPES[weight.dtype], out, inputs, inputs, inputs, 0.0)
        struct.weight = kept.pointer(weight.contiguous())
        struct.bias = kept.pointer(bias.float().contiguous()) if bias is not None else None
        return cls(struct, kept.tensors, exact=True)


class CpuKernel(Kernel):
    """Every uniform grid up to 8 bits, groups that are a multiple of 32 or whole channels.

    Activations are quantized to int8 in groups of at most 128 inputs, each with its own scale;
    with `exact` they stay float32. Either way the weights are the codes and scales that were
    trained, half-integer zero points included, and a token's result does not depend on the others
    in its batch.
    """

    device = "cpu"

    def __init__(self, exact: bool = False) -> None:
        self.name = "cpu-exact" if exact else "cpu"
        self._exact = exact
        self._arena = Arena()

    def refuses_scheme(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not scheme.grid.uniform:
            return f"{scheme.grid.name} is not a uniform grid"
        if scheme.group_size is not None and scheme.group_size % _PAD:
            return f"groups of {scheme.group_size} are no multiple of {_PAD}"
        return None

    def refuses(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if library() is None:
            return "it was not compiled: qexport was installed without a C++ compiler"
        return self.refuses_scheme(scheme, shape)

    def prepack(self, weight: QuantizedTensor, bias: Tensor | None = None) -> CpuLinear:
        self.check(weight)
        kernels = library()
        assert kernels is not None
        (out, inputs), scheme = weight.shape, weight.scheme
        bits = _WIDTHS[scheme.grid.bits]
        padded = -(-inputs // _PAD) * _PAD
        group = scheme.group_size or padded
        act_group = next(size for size in _ACTIVATION_GROUPS if group % size == 0)
        if scheme.group_size is None:
            act_group = min(_ACTIVATION_GROUPS[0], padded)
            group = -(-padded // act_group) * act_group
        kept = _Kept()
        packed = self._arena.take(kernels.qx_packed_bytes(bits, out, inputs))
        codes = weight.codes.contiguous()  # held until it has been read
        kernels.qx_pack(pointer(codes), bits, out, inputs, pointer(packed))
        scales = weight.scales if scheme.scale_dtype == torch.float16 else weight.scales.float()
        struct = CpuLinearStruct(bits, DTYPES[scales.dtype], out, inputs, group, act_group)
        struct.zero = scheme.grid.middle
        struct.weight = kept.pointer(packed)
        struct.scales = kept.pointer(self._arena.copy(_in_blocks(scales)))
        if weight.zeros is not None:
            struct.zeros = kept.pointer(self._arena.copy(_in_blocks(weight.zeros)))
        struct.bias = None if bias is None else kept.pointer(bias.float().contiguous())
        linear = CpuLinear(struct, kept.tensors, self._exact)
        _BY_ADDRESS[packed.data_ptr()] = linear
        return linear


class _Kept:
    """Tensors whose memory C++ points into."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def pointer(self, tensor: Tensor) -> c_void_p:
        self.tensors.append(tensor)
        return pointer(tensor)


def _in_blocks(values: Tensor) -> Tensor:
    """[out, groups] as [blocks of 32, groups, 32], zeros in the rows after the last."""
    out, groups = values.shape
    blocks = -(-out // _BLOCK)
    padded = torch.zeros(blocks * _BLOCK, groups, dtype=values.dtype)
    padded[:out] = values
    return padded.view(blocks, _BLOCK, groups).transpose(1, 2).contiguous()
