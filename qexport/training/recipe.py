"""What a run is trained by where the user does not say: rates, loss and start, for each width."""

from dataclasses import dataclass

from qexport.paretoq import Gradient

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """One width's settings.

    lr, scale_lr      peak rates of weights, and of scales
    distill           share of the loss that is divergence from the dense model, at temperature
    gradient          of rounding: the paper's, or StableQAT's
    mix_steps         optimizer steps between two mixings of masters with their quantized values,
                      0 for none; mix: what is kept of a master then (WinQ)
    block_epochs      passes of the block-wise start, 0 for none; block_windows how many it takes,
                      block_batch at a time;
                      block_compensated by how many of them it rounds by GPTQ first;
                      block_lr, block_scale_lr its rates
    """

    lr: float
    scale_lr: float
    distill: float = 0.0
    temperature: float = 1.0
    gradient: Gradient = "paper"
    mix_steps: int = 0
    mix: float = 0.2
    block_epochs: int = 0
    block_windows: int = 512
    block_batch: int = 4
    block_compensated: int = 0
    block_lr: float = 1e-4
    block_scale_lr: float = 1e-4

    @property
    def has_start(self) -> bool:
        """Whether anything is done block by block."""
        return bool(self.block_epochs or self.block_compensated)


_FINE, _COARSE = Recipe(1e-5, 1e-5), Recipe(2e-5, 2e-5)


def _fast(lr: float, distill: float, block_lr: float) -> Recipe:
    return Recipe(
        lr,
        scale_lr=lr,
        distill=distill,
        block_epochs=1,
        block_windows=128,
        block_compensated=128,
        block_lr=block_lr,
        block_scale_lr=block_lr,
    )


RECIPES: dict[str, dict[str, Recipe]] = {
    # Liu et al. 2025: billions of tokens, no teacher, one rate for everything
    "paretoq": {
        **{"16": _FINE, "4": _FINE, "3": _FINE},
        **{"2": _COARSE, "1.58": _COARSE, "1": _COARSE},
    },
    # for minutes on a small machine: GPTQ, then blocks, then the rest, with a teacher where codes
    # are far apart; rates grow with that distance (benchmarks/accuracy.py measures it)
    "fast": {
        "16": Recipe(5e-5, 5e-5),
        "4": _fast(5e-5, 0.0, 1e-4),
        "3": _fast(1e-4, 0.3, 3e-4),
        "2": _fast(2e-4, 0.5, 8e-4),
        "1.58": _fast(2e-4, 0.5, 8e-4),
        "1": _fast(2e-4, 0.5, 8e-4),
    },
}
