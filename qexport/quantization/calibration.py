"""The text that a model is shown while it is quantized."""

from collections.abc import Callable
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from qexport.data import documents, tokenize, windows
from qexport.quantization.config import QuantizeConfig

__all__ = ["calibration_windows"]

_PIECE = 1 << 16  # characters: a document may be a whole book
_PIECES = 64  # tokenized at a time


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
    parts: list[Tensor] = []
    pieces = (text[at : at + _PIECE] for text in texts for at in range(0, len(text) or 1, _PIECE))
    while sum(map(len, parts)) < 8 * wanted:
        batch = list(islice(pieces, _PIECES))
        if not batch:
            break
        parts.append(tokenize(batch, tokenizer))
    found = windows(torch.cat(parts), config.length, "--length")
    if len(found) < config.samples:
        tell(
            f"{config.calibration} has {len(found)} windows of {config.length} tokens, fewer than "
            f"the {config.samples} asked for; all are taken."
        )
    dice = torch.Generator().manual_seed(config.seed)
    return found[torch.randperm(len(found), generator=dice)[: config.samples]]
