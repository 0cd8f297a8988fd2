"""Which kernel multiplies, and why: the one that was measured to be the fastest for a scheme on a
GPU's architecture, or the first in order of speed that does not refuse."""

from dataclasses import dataclass

import torch

from qexport.errors import InputError, UnsupportedError
from qexport.grid import Scheme, dtype_name
from qexport.runtime.kernels.base import Kernel
from qexport.runtime.kernels.cpu import CpuKernel
from qexport.runtime.kernels.cuda import CudaKernel
from qexport.runtime.kernels.cuda_launch import architecture
from qexport.runtime.kernels.cuda_tiles import preferred
from qexport.runtime.kernels.humming import HummingKernel
from qexport.runtime.kernels.reference import ReferenceKernel
from qexport.runtime.kernels.triton import TritonKernel

__all__ = ["KERNELS", "Choice", "choose"]

# In order of speed. One that is slower than another everywhere is taken only where it is named.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        CpuKernel(),
        CpuKernel(exact=True),
        CudaKernel(),
        TritonKernel(),
        HummingKernel(),
        ReferenceKernel(),
    )
}


@dataclass(frozen=True)
class Choice:
    """A kernel, and why each one before it was passed over: {kernel: reason}."""

    kernel: Kernel
    passed_over: dict[str, str]

    def __str__(self) -> str:
        why = "; ".join(f"not {name}: {reason}" for name, reason in self.passed_over.items())
        return f"{self.kernel.name}{f' ({why})' if why else ''}"


def choose(
    scheme: Scheme,
    shape: tuple[int, int],
    device: torch.device,
    forced: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Choice:
    """The kernel for a weight [out, in] and activations of `dtype`.

    Raises InputError for a `forced` kernel that does not exist, UnsupportedError for one that
    refuses.
    """
    if forced is not None:
        if forced not in KERNELS:
            raise InputError(f"there is no kernel {forced!r}; there are {', '.join(KERNELS)}.")
        reason = _refusal(KERNELS[forced], scheme, shape, device, dtype)
        if reason is not None:
            raise UnsupportedError(f"kernel {forced} does not take {scheme} on {device}: {reason}.")
        return Choice(KERNELS[forced], {})
    passed_over: dict[str, str] = {}
    first = preferred(architecture(device), scheme) if device.type == "cuda" else None
    for name, kernel in sorted(KERNELS.items(), key=lambda item: item[0] != first):
        reason = _refusal(kernel, scheme, shape, device, dtype)
        if reason is None:
            return Choice(kernel, passed_over)
        passed_over[name] = reason
    raise AssertionError("the reference kernel takes everything")


def _refusal(
    kernel: Kernel,
    scheme: Scheme,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    reason = kernel.refuses(scheme, shape, device)
    if reason is None and dtype not in kernel.activations:
        return f"it does not take {dtype_name(dtype)} activations"
    return reason
