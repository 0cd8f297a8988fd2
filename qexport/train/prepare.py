"""A dense model made trainable on the grid: every parameter passes through its served value.

Parametrizations stand between the fp32 master and whoever reads it. A quantized weight reads as
`fake_quantize(master, alpha)`, every other parameter as the value that the checkpoint's dtype will
store. What the forward pass of training computes with is therefore what is written and served.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qexport.checkpoint import Modules
from qexport.errors import CheckpointError, InputError
from qexport.grid import Scheme
from qexport.paretoq import Gradient, effective_scale, fake_quantize, initial_alpha
from qexport.shards import Parts
from qexport.train.ranks import whole

__all__ = [
    "Choose",
    "FakeQuantize",
    "StoredAs",
    "prepare",
    "quantized_modules",
    "run_parts",
    "run_tensors",
    "store",
]

Choose = Callable[[str], Scheme | None]  # by a layer's name

QUANTIZED_LAYERS = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)


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
        return fake_quantize(weight, self.alpha, self.scheme, self.gradient, fused=self.fused)

    def scales(self) -> Tensor:
        """The stored scales [out, groups], exact in `scheme.scale_dtype`."""
        return effective_scale(whole(self.alpha).detach(), self.scheme).to(self.scheme.scale_dtype)


class StoredAs(nn.Module):
    """Reads a master parameter as the value that `dtype` stores; the gradient passes through."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        stored: Tensor = _Round.apply(master, self.dtype)  # type: ignore[no-untyped-call]
        return stored


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, master: Tensor, dtype: torch.dtype) -> Tensor:
        return master.to(dtype).to(master.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def quantized_modules(model: nn.Module, choose: Choose) -> Modules:
    """Scheme and shape of what is quantized of a `model`, which may be without its weights.

    The linear layers q, k, v, o, gate, up and down are, each on the scheme that `choose` gives for
    its name; not those for which it gives None, nor embeddings, head, norms and biases.

    Raises InputError where the group size does not divide a layer's inputs, CheckpointError where
    the model has matrices that are none of these.
    """
    modules: Modules = {}
    for name, layer in _layers(model).items():
        scheme = choose(name)
        if scheme is not None:
            _check_group(name, layer, scheme)
            modules[name] = scheme, (layer.out_features, layer.in_features)
    return modules


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
    if stored != torch.float32:
        parametrize.register_parametrization(module, parameter, StoredAs(stored), unsafe=True)


def _layers(model: nn.Module) -> dict[str, nn.Linear]:
    """What may be quantized. Raises CheckpointError as `prepare` does."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in QUANTIZED_LAYERS
    }
    if not layers:
        raise CheckpointError(
            "the model has none of the layers that are quantized (q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj)."
        )
    _check_whole(model, layers)
    return layers


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


def _check_whole(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Raise CheckpointError for a matrix in the decoder blocks that would be left dense."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    for name, module in model.named_modules():
        matrix = any(p.dim() > 1 for p in module.parameters(recurse=False))
        if matrix and name not in layers and not any(module is end for end in ends):
            raise CheckpointError(
                f"{name} is a matrix that would be left unquantized: this architecture is not "
                "supported yet (q, k, v, o, gate, up and down projections are)."
            )


def _check_group(name: str, layer: nn.Linear, scheme: Scheme) -> None:
    try:
        scheme.groups(layer.in_features)
    except ValueError:
        if scheme.super_block is not None:
            raise InputError(
                f"{scheme.super_block.name} wants multiples of {scheme.super_block.size} inputs, "
                f"and {name} has {layer.in_features}; give it --module-bits of its own, or leave "
                "it out by --exclude."
            ) from None
        sizes = [g for g in (16, 32, 64, 128, 256) if layer.in_features % g == 0]
        raise InputError(
            f"--group-size {scheme.group_size} does not divide the {layer.in_features} inputs of "
            f"{name}; choose one that does ({', '.join(map(str, sizes)) or 'none is usual'}), "
            "or leave it out for one scale per channel."
        ) from None
