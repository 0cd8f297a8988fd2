"""What a run trains on: windows of one or several sources, mixed, and what is held out of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qexport.data import windows
from qexport.errors import DataError
from qexport.training.config import TrainConfig
from qexport.training.tokens import Request, Tokens, tokens_of

__all__ = ["IGNORED", "MixedWindows", "Text", "Windows", "load_text"]

IGNORED = -100  # a label that is no target
_HELD_OUT = 1 << 18  # tokens of a hub dataset that is evaluated on: it may have no end


@dataclass(frozen=True)
class Windows:
    """tokens int32 [n, length], and bool [n, length] of those that are targets; None for all."""

    tokens: Tensor
    targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def labels(self, rows: int | slice) -> Tensor:
        """int64, of one window or several; IGNORED where a token is no target."""
        tokens = self.tokens[rows].long()
        return tokens if self.targets is None else tokens.masked_fill(~self.targets[rows], IGNORED)

    def __getitem__(self, rows: slice) -> "Windows":
        return Windows(self.tokens[rows], None if self.targets is None else self.targets[rows])


@dataclass(frozen=True)
class Text:
    """Windows of all sources, one source after the other.

    sizes      how many are of each; weights: what share of the training is, relative to the others
    held_out   windows that are not trained on, or None where there is too little text
    """

    rows: Windows
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    held_out: Windows | None


def load_text(config: TrainConfig, tokenizer: Any, tell: Callable[[str], None]) -> Text:
    """Read, tokenize and pack every source. Raises InputError or DataError as `documents` does."""
    parts, held, weights = [], [], []
    for name, weight in config.sources:
        mine, apart = _source(name, config, tokenizer, tell)
        parts.append(mine)
        weights.append(float(len(mine)) if weight is None else weight)
        held += [] if apart is None else [apart]
    if config.eval_data is not None:
        limit = _HELD_OUT if _streams(config.eval_data) else None
        asked = Request(config.eval_data, "eval", False, config.loss_on == "assistant", limit)
        held = [_cut(tokens_of(asked, tokenizer, tell)[0], config.max_length)]
    sizes = tuple(map(len, parts))
    return Text(_joined(parts), sizes, tuple(weights), _joined(held) if held else None)


def _source(
    name: str, config: TrainConfig, tokenizer: Any, tell: Callable[[str], None]
) -> tuple[Windows, Windows | None]:
    """Training windows, and held-out ones where there is text enough for one."""
    limit = None
    if config.max_steps is not None and _streams(name):  # it may have no end
        start = config.settings.block_windows if config.starts_by_blocks else 0
        limit = max(max(1, config.max_steps) * config.tokens_per_step, start * config.max_length)
    apart = config.eval_data is None
    asked = Request(name, "train", apart, config.loss_on == "assistant", limit)
    kept, held = tokens_of(asked, tokenizer, tell)
    if not len(kept.ids):
        kept, held = held, kept
    training = _cut(kept, config.max_length)
    if not apart:
        return training, None
    try:
        return training, _cut(held, config.max_length)
    except DataError:
        # Too few documents to hold out: the last windows of the text, where it has enough.
        count = len(training) // 20
        return (training[:-count], training[-count:]) if count else (training, None)


def _streams(name: str) -> bool:
    return name != "builtin" and not Path(name).is_file()


def _cut(tokens: Tokens, length: int) -> Windows:
    """Raises DataError where not one window comes out, or none that has a target."""
    ids, targets = windows(tokens.ids, length, "--max-length"), None
    if tokens.targets is not None:
        targets = windows(tokens.targets, length, "--max-length")
        some = targets[:, 1:].any(1)
        if not bool(some.any()):
            raise DataError("--loss-on assistant: the text has no word of an assistant.")
        if not bool(some.all()):
            ids, targets = ids[some], targets[some]
    return Windows(ids, targets)


def _joined(parts: Sequence[Windows]) -> Windows:
    if len(parts) == 1:
        return parts[0]
    targets = [part.targets for part in parts if part.targets is not None]
    tokens = torch.cat([part.tokens for part in parts])
    return Windows(tokens, torch.cat(targets) if targets else None)


class MixedWindows(Dataset[dict[str, Tensor]]):
    """Windows in a seeded order, `total` items long: each source in passes of its own.

    Sources take turns so that at every moment each has had its share. The order is a function of
    the index alone, so that a resumed run sees what it would have seen.
    """

    def __init__(
        self,
        rows: Windows,
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
        return {
            "input_ids": self._rows.tokens[window].long(),
            "labels": self._rows.labels(window),
            "window": torch.tensor(window),
        }

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
