"""Which layers of a model are quantized, and whether a scheme fits them."""

from collections.abc import Callable

from torch import nn

from qexport.checkpoint import Modules
from qexport.errors import CheckpointError, InputError
from qexport.experts import is_router
from qexport.grid import Scheme

__all__ = ["Choose", "quantizable", "quantized_modules"]

Choose = Callable[[str], Scheme | None]  # by a layer's name

_QUANTIZED = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)


def quantized_modules(model: nn.Module, choose: Choose) -> Modules:
    """Scheme and shape of what is quantized of a `model`, which may be without its weights.

    The linear layers q, k, v, o, gate, up and down are, each on the scheme that `choose` gives for
    its name; not those for which it gives None, nor embeddings, head, norms and biases.

    Raises InputError where the group size does not divide a layer's inputs, CheckpointError where
    the model has matrices that are none of these.
    """
    modules: Modules = {}
    for name, layer in quantizable(model).items():
        scheme = choose(name)
        if scheme is not None:
            _check_group(name, layer, scheme)
            modules[name] = scheme, (layer.out_features, layer.in_features)
    return modules


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that may be quantized. Raises CheckpointError as `quantized_modules` does."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _QUANTIZED
    }
    if not layers:
        raise CheckpointError(
            "the model has none of the layers that are quantized (q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj)."
        )
    _check_whole(model, layers)
    return layers


def _check_whole(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Raise CheckpointError for a matrix in the decoder blocks that would be left dense."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    for name, module in model.named_modules():
        matrix = any(p.dim() > 1 for p in module.parameters(recurse=False))
        dense = is_router(module) or any(module is end for end in ends)
        if matrix and name not in layers and not dense:
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
                "it out by --exclude or --include."
            ) from None
        sizes = [g for g in (16, 32, 64, 128, 256) if layer.in_features % g == 0]
        absent = " for one scale per channel" if scheme.grid.uniform else ""
        raise InputError(
            f"--group-size {scheme.group_size} does not divide the {layer.in_features} inputs of "
            f"{name}; choose one that does ({', '.join(map(str, sizes)) or 'none is usual'}), "
            f"or leave it out{absent}."
        ) from None
