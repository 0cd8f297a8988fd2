"""What a run trains on: windows of one or several sources, mixed, and what is held out of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qexport.data import documents, hold_out, tokenize, windows
from qexport.errors import DataError
from qexport.train.config import TrainConfig

__all__ = ["MixedWindows", "Text", "load_text"]


@dataclass(frozen=True)
class Text:
    """Windows [n, length] of all sources, one source after the other.

    sizes      how many are of each; weights: what share of the training is, relative to the others
    held_out   windows that are not trained on, or None where there is too little text
    """

    rows: Tensor
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    held_out: Tensor | None


def load_text(config: TrainConfig, tokenizer: Any) -> Text:
    """Read, tokenize and pack every source. Raises InputError or DataError as `documents` does."""
    parts, held, weights = [], [], []
    for name, weight in config.sources:
        mine, apart = _source(name, config, tokenizer)
        parts.append(mine)
        weights.append(float(len(mine)) if weight is None else weight)
        held += [] if apart is None else [apart]
    if config.eval_data is not None:
        texts = list(documents(config.eval_data, "eval", tokenizer))
        held = [windows(tokenize(texts, tokenizer), config.max_length)]
    sizes = tuple(map(len, parts))
    return Text(torch.cat(parts), sizes, tuple(weights), torch.cat(held) if held else None)


def _source(name: str, config: TrainConfig, tokenizer: Any) -> tuple[Tensor, Tensor | None]:
    """Training windows, and held-out ones where there is text enough for one."""
    texts = list(documents(name, "train", tokenizer))
    held: list[str] = []
    if config.eval_data is None:
        if name == "builtin":
            held = list(documents(name, "eval", tokenizer))
        else:
            texts, held = hold_out(texts)
    if not texts:
        texts, held = held, []
    training = windows(tokenize(texts, tokenizer), config.max_length)
    if config.eval_data is not None:
        return training, None
    try:
        return training, windows(tokenize(held, tokenizer), config.max_length)
    except DataError:
        # Too few documents to hold out: the last windows of the text, where it has enough.
        count = len(training) // 20
        return (training[:-count], training[-count:]) if count else (training, None)


class MixedWindows(Dataset[dict[str, Tensor]]):
    """Windows in a seeded order, `total` items long: each source in passes of its own.

    Sources take turns so that at every moment each has had its share. The order is a function of
    the index alone, so that a resumed run sees what it would have seen.
    """

    def __init__(
        self,
        rows: Tensor,
        total: int,
        seed: int,
        sizes: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> None:
        self._rows = rows
        self._total = total
        self._seed = seed
        self._sizes = list(sizes) or [len(rows)]
        self._turns = _turns(weights, total) if len(weights) > 1 else None
        self._orders: dict[int, tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.window(index)
        row = self._rows[window]
        return {"input_ids": row, "labels": row, "window": torch.tensor(window)}

    def window(self, index: int) -> int:
        """The number of the row that is the item of this index."""
        source, turn = (0, index) if self._turns is None else self._turns[index].tolist()
        size, before = self._sizes[source], sum(self._sizes[:source])
        number, position = divmod(turn, size)
        if self._orders.get(source, (-1,))[0] != number:
            generator = torch.Generator().manual_seed(self._seed + (number << 32) + (source << 48))
            self._orders[source] = number, torch.randperm(size, generator=generator)
        return before + int(self._orders[source][1][position])

    def first_windows(self) -> list[int]:
        """The rows that are met at all, in the order in which they are met first."""
        return list(dict.fromkeys(map(self.window, range(self._total))))


def _turns(weights: Sequence[float], total: int) -> Tensor:
    """Of each of `total` items: its source, and how many of that source went before it.

    The j-th item of a source is due at (j + 1/2) / weight.
    """
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    due, sources, turns = [], [], []
    for source, part in enumerate(share.tolist()):
        count = min(total, int(part * total) + 2)
        numbers = torch.arange(count)
        due.append((numbers + 0.5) / part)
        sources.append(torch.full((count,), source))
        turns.append(numbers)
    order = torch.sort(torch.cat(due), stable=True).indices[:total]
    return torch.stack([torch.cat(sources)[order], torch.cat(turns)[order]], dim=1)
