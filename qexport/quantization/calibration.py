"""The text that a model is shown while it is quantized."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from qexport.data import documents, tokenize, windows
from qexport.quantization.config import QuantizeConfig

__all__ = ["calibration_windows"]

_DOCUMENTS, _CHARACTERS = 64, 1 << 20  # tokenized at a time: tokens take 200 times the text


def calibration_windows(
    config: QuantizeConfig, tokenizer: Any, tell: Callable[[str], None]
) -> Tensor:
    """Token windows int64 [n, length], of as many as are asked for, or all that there are.

    They are drawn by the seed from the text's beginning, eight times what is needed; no more of it
    is read. Raises InputError or DataError as `documents` does, and for less than one window.
    """
    assert config.calibration is not None
    wanted = config.samples * config.length
    texts = documents(config.calibration, "calibration", tokenizer)
    if config.calibration == "builtin":  # whose own split for this is a few thousand tokens
        texts = chain(texts, documents("builtin", "train", tokenizer))
    parts = [torch.empty(0, dtype=torch.int64)]
    for batch in _batches(texts):
        parts.append(tokenize(batch, tokenizer))
        if sum(map(len, parts)) >= 8 * wanted:
            break
    found = windows(torch.cat(parts), config.length, "--length")
    if len(found) < config.samples:
        tell(
            f"{config.calibration} has {len(found)} windows of {config.length} tokens, fewer than "
            f"the {config.samples} asked for; all are taken."
        )
    dice = torch.Generator().manual_seed(config.seed)
    return found[torch.randperm(len(found), generator=dice)[: config.samples]]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Some documents at a time; one that is a whole book comes in pieces."""
    batch: list[str] = []
    room = _CHARACTERS
    for text in texts:
        for at in range(0, len(text), _CHARACTERS):
            piece = text[at : at + _CHARACTERS]
            if batch and (len(batch) == _DOCUMENTS or len(piece) > room):
                yield batch
                batch, room = [], _CHARACTERS
            batch.append(piece)
            room -= len(piece)
    if batch:
        yield batch
