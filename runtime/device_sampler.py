"""Choosing tokens where logits are: what `sampler` does without penalties, for a whole batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NO_TOKEN", "Draw", "choose", "effort"]

NO_TOKEN = -1  # where logits are no numbers


@dataclass(frozen=True)
class Draw:
    """How one token is drawn; see `Sampling`. number: random, in [0, 1); temperature 0: greedy."""

    temperature: float = 0.0
    number: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def cut(self) -> bool:
        """Whether some tokens are left out, which takes a sort."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0

    def row(self, vocabulary: int) -> tuple[float, ...]:
        """Numbers for `choose`."""
        return (
            *(self.temperature or 1.0, float(not self.temperature), self.number),
            *(min(self.top_k, vocabulary) or vocabulary, self.top_p, self.min_p),
        )


def effort(draws: list[Draw]) -> int:
    """What a batch takes: 0 greedy, 1 drawn from all tokens, 2 drawn from some."""
    return max((2 if draw.cut else 1) if draw.temperature else 0 for draw in draws)


def choose(logits: Tensor, rows: Tensor, how: int) -> Tensor:
    """Tokens int64 [batch] for logits float32 [batch, vocabulary]; NO_TOKEN where there are NaN.

    rows  float64 [6, batch] of `Draw.row`; how: at least `effort` of them
    Probabilities are summed in float64, as `Sampler` does.
    """
    best = logits.argmax(-1)  # the first NaN, if there is one
    highest = logits.gather(-1, best.unsqueeze(-1))
    found = best
    if how:
        temperature, greedy, number, top_k, top_p, min_p = rows.unsqueeze(-1)
        order = None
        if how == 2:
            order = logits.sort(dim=-1, descending=True, stable=True).indices
        shares = ((logits.double() - highest) / temperature).exp()
        if order is not None:
            shares = _cut(shares, order, top_k, top_p, min_p)
        sums = shares.cumsum(-1)
        drawn = torch.searchsorted(sums, number * sums[:, -1:], right=True)
        last = (
            (shares > 0).long().mul_(torch.arange(shares.shape[-1], device=logits.device)).amax(-1)
        )
        found = torch.where(greedy.squeeze(-1) > 0, best, drawn.squeeze(-1).minimum(last))
    return torch.where(highest.squeeze(-1).isfinite(), found, NO_TOKEN)


def _cut(shares: Tensor, order: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The same with 0 for tokens that are not among the most probable, whose `order` is given."""
    highest = shares.gather(-1, order)
    rank = torch.arange(shares.shape[-1], device=shares.device)
    kept = highest * ((rank < top_k) & (highest >= min_p))
    before = kept.cumsum(-1) - kept
    kept = kept * (before < top_p * kept.sum(-1, keepdim=True))
    return torch.zeros_like(shares).scatter_(-1, order, kept)
