"""Perplexity of any checkpoint, and its divergence from a reference, on the same tokens.

The text is one stream of tokens. Windows of `length` predictions overlap by one token, so that
every token but the first is predicted exactly once, with at least one token before it. The mean is
over tokens, not windows. The report carries a hash of the tokens: only equal hashes compare.
"""

import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qexport.errors import DataError, InputError, QexportError

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Figures over `tokens` predictions; the last three only against a reference.

    loss            mean negative log-likelihood, nats; perplexity its exponential
    kl_divergence   mean KL(reference || model), nats
    top1_agreement  share of positions where both have the same most likely token
    """

    loss: float
    perplexity: float
    tokens: int
    window: int
    tokens_sha256: str
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@torch.inference_mode()
def evaluate(
    model: Any,
    tokens: Tensor,
    window: int,
    reference: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate `model` on tokens int64 [n]; `progress` is told (done, of) in tokens.

    Raises DataError for fewer than two tokens, InputError for tokens outside the vocabulary, a
    window longer than the context or a reference with another vocabulary.
    """
    total = tokens.numel() - 1
    if total < 1:
        raise DataError("the text has fewer than two tokens; give more text.")
    _check(model, reference, tokens, window)
    loss = reference_loss = divergence = agreement = 0.0
    for start in range(0, total, window):
        piece = tokens[start : start + window + 1].to(model.device)
        scores = _log_probabilities(model, piece)
        loss += _nll(scores, piece)
        if reference is not None:
            expected = _log_probabilities(reference, piece)
            reference_loss += _nll(expected, piece)
            divergence += float(F.kl_div(scores, expected, reduction="sum", log_target=True))
            agreement += float((scores.argmax(-1) == expected.argmax(-1)).sum())
        if progress is not None:
            progress(min(start + window, total), total)
    for found, whose in ((loss, "the model"), (reference_loss + divergence, "the reference")):
        if not math.isfinite(found):
            raise QexportError(
                f"{whose} gives NaN on this text; its weights or its dtype are at fault."
            )
    result = Evaluation(
        loss=loss / total,
        perplexity=_exp(loss / total),
        tokens=total,
        window=window,
        tokens_sha256=hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    )
    if reference is None:
        return result
    return Evaluation(
        **{
            **asdict(result),
            "reference_perplexity": _exp(reference_loss / total),
            "kl_divergence": divergence / total,
            "top1_agreement": agreement / total,
        }
    )


def _log_probabilities(model: Any, piece: Tensor) -> Tensor:
    """float32 [n, vocabulary] for the n tokens that follow the first of `piece` [n + 1]."""
    logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def _nll(scores: Tensor, piece: Tensor) -> float:
    return -float(scores.gather(-1, piece[1:, None]).sum(dtype=torch.float64))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else sys.float_info.max


def _check(model: Any, reference: Any, tokens: Tensor, window: int) -> None:
    vocabulary = model.config.vocab_size
    if int(tokens.max()) >= vocabulary:
        raise InputError("the tokenizer gives tokens outside the model's vocabulary.")
    if reference is not None and reference.config.vocab_size != vocabulary:
        raise InputError("--reference has another vocabulary, so that the two do not compare.")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise InputError(f"--window {window} is longer than the model's context of {limit}.")
