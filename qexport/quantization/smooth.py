"""SmoothQuant (Xiao et al. 2023): the range of activations is shared with the weights.

`factor = max|X|^a / max|W|^(1-a)` of each input; what the inputs are divided by makes them fit for
int8, and the weights, multiplied by it, still are.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qexport.quantization.activations import Seen

__all__ = ["smooth_factors"]


def smooth_factors(
    weights: Sequence[Tensor], seen: Seen, tied: Callable[[Tensor], Tensor], strength: float
) -> Tensor:
    """Factors float32 [in] for layers that share their inputs; `strength` is the a above."""
    of_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    found = tied(seen.largest).clamp(min=1e-5) ** strength
    found = found / tied(of_weights).clamp(min=1e-5) ** (1 - strength)
    return found.clamp(min=1e-5)
