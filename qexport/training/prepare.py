"""A dense model made trainable on the grid: every parameter passes through its served value.

Parametrizations stand between the fp32 master and whoever reads it. A quantized weight reads as
`fake_quantize(master, alpha)`, every other parameter as the value that the checkpoint's dtype will
store; of embeddings, rows are rounded once they were looked up. What the forward pass of training
computes with is therefore what is written and served.

Linear layers are given weights in the dtype that autocast multiplies in: a plain step makes that
cast as well, and two passes over the weights for one are saved.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qexport.checkpoint import Modules
from qexport.grid import Scheme
from qexport.layers import Choose, quantized_modules
from qexport.paretoq import Gradient, effective_scale, fake_quantize, initial_alpha
from qexport.precision import product_dtype
from qexport.ranks import whole
from qexport.shards import Parts

__all__ = [
    "FakeQuantize",
    "StoredAs",
    "prepare",
    "run_parts",
    "run_tensors",
    "store",
]


class FakeQuantize(nn.Module):
    """Reads a master weight [out, in] as its quantized value; owns the learned alpha."""

    def __init__(
        self,
        weight: Tensor,
        scheme: Scheme,
        scale_init: Literal["paper", "mse"],
        gradient: Gradient = "paper",
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.gradient = gradient
        self.fused = fused
        self.alpha = nn.Parameter(initial_alpha(weight, scheme, scale_init))

    def forward(self, weight: Tensor) -> Tensor:
        dtype = product_dtype(weight.device)
        how = (self.scheme, self.gradient)
        return fake_quantize(weight, self.alpha, *how, dtype=dtype, fused=self.fused)

    def scales(self) -> Tensor:
        """The stored scales [out, groups], exact in `scheme.scale_dtype`."""
        return effective_scale(whole(self.alpha).detach(), self.scheme).to(self.scheme.scale_dtype)


class StoredAs(nn.Module):
    """Reads a master parameter as the value that `dtype` stores; the gradient passes through.

    multiplied    by a linear layer, which is given the dtype that it multiplies in
    """

    def __init__(self, dtype: torch.dtype, *, multiplied: bool = False) -> None:
        super().__init__()
        self.dtype = dtype
        self.multiplied = multiplied

    def forward(self, master: Tensor) -> Tensor:
        read = product_dtype(master.device) if self.multiplied else master.dtype
        return _stored(master, self.dtype, read)


def _stored(master: Tensor, dtype: torch.dtype, read: torch.dtype) -> Tensor:
    """What `dtype` stores of a tensor, in dtype `read`; the gradient passes through."""
    stored: Tensor = _Round.apply(master, dtype, read)  # type: ignore[no-untyped-call]
    return stored


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, master: Tensor, dtype: torch.dtype, read: torch.dtype) -> Tensor:
        ctx.dtype = master.dtype
        return master.to(dtype).to(read)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None


def prepare(
    model: nn.Module,
    choose: Choose,
    scale_init: Literal["paper", "mse"],
    stored: torch.dtype,
    gradient: Gradient = "paper",
    fused: bool = False,
) -> Modules:
    """Parametrize an fp32 `model` in place; returns its `quantized_modules`, and raises as they do.

    What is not quantized is trained and read as `stored`. `gradient` and `fused` are those of
    `fake_quantize`.
    """
    modules = quantized_modules(model, choose)
    for name, module in list(model.named_modules()):
        for parameter, value in list(module.named_parameters(recurse=False)):
            if name in modules and parameter == "weight":
                scheme = modules[name][0]
                reader: nn.Module = FakeQuantize(value, scheme, scale_init, gradient, fused)
                parametrize.register_parametrization(module, parameter, reader, unsafe=True)
            else:
                store(module, parameter, stored)
    return modules


def store(module: nn.Module, parameter: str, stored: torch.dtype) -> None:
    """Have a parameter read as what is stored of it."""
    if stored == torch.float32:
        return
    if type(module) is nn.Embedding:  # only rows that are looked up are rounded
        module.register_forward_hook(lambda _, __, rows: _stored(rows, stored, rows.dtype))
        return
    reader = StoredAs(stored, multiplied=isinstance(module, nn.Linear) and parameter == "weight")
    parametrize.register_parametrization(module, parameter, reader, unsafe=True)


def run_parts(plan: nn.Module, modules: Modules, stored: torch.dtype) -> Parts:
    """Dtypes and shapes of `run_tensors`, from a model that may be without its weights."""
    parts: Parts = {}
    for name, parameter in plan.named_parameters():
        module = name.removesuffix(".weight")
        if module not in modules or module == name:
            parts[name] = stored, tuple(parameter.shape)
            continue
        scheme, (out, inputs) = modules[module]
        parts[name] = torch.float32, (out, inputs)
        parts[f"{name}_scale"] = scheme.scale_dtype, (out, scheme.groups(inputs))
    return parts


def run_tensors(model: nn.Module, stored: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a RUN: latent weights float32, `weight_scale`s, all else as `stored`.

    Where they are spread over processes, all of these have to ask.

    Parameters that are tied are given once, under their first name.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        if name.endswith(".parametrizations") or ".parametrizations." in name:
            continue
        prefix = f"{name}." if name else ""
        readers = getattr(module, "parametrizations", {})
        for parameter, chain in readers.items():
            if id(chain.original) in seen:
                continue
            seen.add(id(chain.original))
            master = whole(chain.original).detach()
            if isinstance(chain[0], FakeQuantize):
                yield f"{prefix}{parameter}", master
                yield f"{prefix}{parameter}_scale", chain[0].scales()
            else:
                yield f"{prefix}{parameter}", master.to(stored)
        for parameter, value in module.named_parameters(recurse=False):
            if id(value) not in seen:
                seen.add(id(value))
                yield f"{prefix}{parameter}", whole(value).detach().to(stored)
