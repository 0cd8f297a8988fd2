"""Whether the quantizers of a run are compiled, and the proof that this changes no value."""

from collections.abc import Iterable

import torch
from rich.console import Console

from qexport.checkpoint import Modules
from qexport.errors import UnsupportedError
from qexport.grid import Scheme
from qexport.paretoq import Gradient, fake_quantize, initial_alpha
from qexport.precision import dtype_of, precision_of
from qexport.training.config import TrainConfig

__all__ = ["fusing", "why_not"]

_ENOUGH = 2e9  # weights times steps, from which on compiling takes less time than it saves
_TOLERANCE = 1e-5  # of a scale's gradient, a sum that may be taken in another order


def fusing(config: TrainConfig, modules: Modules, max_steps: int, console: Console) -> bool:
    """Whether quantizers are to be fused: where that is asked for, or pays.

    Raises UnsupportedError where it is asked for and cannot be done.
    """
    weights = sum(out * inputs for _, (out, inputs) in modules.values())
    blocks = 0 if config.phase == "end" else config.settings.block_epochs
    passes = max_steps + blocks * config.settings.block_windows // config.settings.block_batch
    if config.compile is False or not modules:
        return False
    if config.compile is None and weights * passes < _ENOUGH:
        return False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    schemes = dict.fromkeys(scheme for scheme, _ in modules.values())
    dtype = dtype_of(precision_of(config.precision))
    reason = why_not(schemes, config.settings.gradient, device, dtype)
    if reason is not None:
        if config.compile:
            raise UnsupportedError(f"--compile: {reason}.")
        console.print(f"quantizers are not compiled: {reason}", highlight=False)
        return False
    return True


def why_not(
    schemes: Iterable[Scheme],
    gradient: Gradient,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """Why compiled quantizers may not take the place of the others, or None.

    They have to work here, and to give the same values bit by bit, ties and all, in the `dtype`
    that products are taken in.
    """
    for scheme in schemes:
        inputs = 2 * (scheme.super_block.size if scheme.super_block else scheme.group_size or 64)
        dice = torch.Generator().manual_seed(0)
        weight = torch.randn(64, inputs, generator=dice).to(device)
        alpha = initial_alpha(weight, scheme, "mse")
        values = fake_quantize(weight, alpha, scheme)
        weight[::2] = values[::2]  # in the middle of a step,
        weight[1::4] = values[1::4] + (values[1::4] - values.flip(1)[1::4]) / 2  # and on its edges
        down = torch.randn(64, inputs, generator=dice).to(device, dtype)
        plain = _both(weight, alpha, down, scheme, gradient, fused=False)
        try:
            fused = _both(weight, alpha, down, scheme, gradient, fused=True)
        except Exception as error:
            return f"torch.compile fails ({' '.join(str(error).split())[:200]})"
        if not torch.equal(plain[0], fused[0]):
            return f"compiled code rounds {scheme} otherwise"
        for wanted, found in zip(plain[1:], fused[1:], strict=True):
            if not bool((wanted - found).abs().max() <= _TOLERANCE * wanted.abs().max()):
                return f"compiled code has other gradients for {scheme}"
    return None


def _both(
    weight: torch.Tensor,
    alpha: torch.Tensor,
    down: torch.Tensor,
    scheme: Scheme,
    gradient: Gradient,
    *,
    fused: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantized values, and the gradients of weight and alpha for `down`, that of the values."""
    weight, alpha = weight.clone().requires_grad_(), alpha.clone().requires_grad_()
    values = fake_quantize(weight, alpha, scheme, gradient, dtype=down.dtype, fused=fused)
    of_weight, of_alpha = torch.autograd.grad(values, (weight, alpha), down)
    return values.detach(), of_weight, of_alpha
