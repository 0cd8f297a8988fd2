"""How the next token is chosen: penalties, temperature, truncation, and a random choice."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import InputError, QexportError
from qexport.runtime.constraint import Constraint
from qexport.runtime.device_sampler import Draw

__all__ = ["MOST_LOGPROBS", "MOST_STOPS", "Sampler", "Sampling", "TokenLogprob", "no_numbers"]

_GREEDY_BELOW = 1e-4  # smaller temperatures overflow float32 and mean the same
MOST_LOGPROBS = 20
MOST_STOPS = 16
_FIRST_LOOK = 256  # tokens that are sorted first: a nucleus is rarely larger

Logits = NDArray[np.float32]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to end. Raises InputError for what makes no sense.

    temperature 0 is greedy. top_k keeps so many tokens (0: all), top_p the smallest set with that
    probability, min_p those at least so probable relative to the best. repetition_penalty divides
    logits of tokens of prompt and output (Keskar et al. 2019), frequency_penalty and
    presence_penalty are subtracted for those of the output. logprobs asks for so many of the most
    probable tokens beside each one, None for none at all. ignore_end goes on after end tokens.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_end: bool = False

    def __post_init__(self) -> None:
        checks = {
            f"max_tokens {self.max_tokens} is not positive": self.max_tokens >= 1,
            f"temperature {self.temperature} is not a number from 0 up": 0
            <= self.temperature
            < float("inf"),
            f"top_p {self.top_p} is not between 0 and 1": 0 < self.top_p <= 1,
            f"top_k {self.top_k} is negative": self.top_k >= 0,
            f"min_p {self.min_p} is not between 0 and 1": 0 <= self.min_p <= 1,
            f"repetition_penalty {self.repetition_penalty} is not a positive number": 0
            < self.repetition_penalty
            < float("inf"),
            "frequency_penalty and presence_penalty are not between -2 and 2": abs(
                self.frequency_penalty
            )
            <= 2
            and abs(self.presence_penalty) <= 2,
            f"logprobs {self.logprobs} is not between 0 and {MOST_LOGPROBS}": self.logprobs is None
            or 0 <= self.logprobs <= MOST_LOGPROBS,
            "a logit_bias is not between -100 and 100, or its token negative": all(
                token >= 0 and -100 <= bias <= 100 for token, bias in self.logit_bias.items()
            ),
            f"there are more than {MOST_STOPS} stop strings, or an empty one": len(self.stop)
            <= MOST_STOPS
            and all(self.stop),
        }
        for wrong, holds in checks.items():
            if not holds:
                raise InputError(f"{wrong}.")


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability under the model, and the most probable ones at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def no_numbers() -> QexportError:
    """The error where logits are NaN."""
    return QexportError("the model gave NaN; its weights or its dtype are at fault.")


class Sampler:
    """The sampler of one request, with random numbers of its own."""

    def __init__(
        self, sampling: Sampling, prompt: list[int], constraint: Constraint | None = None
    ) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
        self._prompt = np.unique(np.array(prompt, dtype=np.int64))
        self._output: Counter[int] = Counter()
        biases = sampling.logit_bias
        self._biased = np.fromiter(biases, np.int64, len(biases))
        self._biases = np.fromiter(biases.values(), np.float32, len(biases))

    @property
    def plain(self) -> bool:
        """Whether `draw` says all: nothing depends on tokens so far, and no logprobs are wanted."""
        sampling = self._sampling
        penalties = (sampling.frequency_penalty, sampling.presence_penalty)
        changed = any(penalties) or sampling.repetition_penalty != 1 or bool(sampling.logit_bias)
        return not changed and sampling.logprobs is None and self._constraint is None

    def draw(self) -> Draw:
        """What `choose` would do for the next token, to be done elsewhere."""
        sampling = self._sampling
        if sampling.temperature < _GREEDY_BELOW:
            return Draw()
        number = self._random.random()
        return Draw(sampling.temperature, number, sampling.top_k, sampling.top_p, sampling.min_p)

    def choose(self, logits: Logits) -> tuple[int, TokenLogprob | None]:
        """The next token from logits [vocabulary], which are left as they are.

        Raises QexportError where one is no number.
        """
        best = int(logits.argmax())  # numpy's argmax stops at the first NaN
        if not np.isfinite(logits[best]):
            raise no_numbers()
        token = self._choose(logits, best)
        self._output[token] += 1
        if self._constraint is not None:
            self._constraint.accept(token)
        wanted = self._sampling.logprobs
        return token, None if wanted is None else _logprob(logits, token, wanted)

    def _choose(self, logits: Logits, best: int) -> int:
        sampling = self._sampling
        shaped = self._penalized(logits)
        if sampling.temperature < _GREEDY_BELOW:
            return best if shaped is logits else int(shaped.argmax())
        kept = np.arange(len(shaped))
        if 0 < sampling.top_k < len(shaped):
            kept = np.argpartition(shaped, -sampling.top_k)[-sampling.top_k :]
            kept.sort()  # so that equal logits are drawn alike whatever the partition did
        scaled = shaped[kept].astype(np.float64) / sampling.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities[probabilities < sampling.min_p] = 0  # the best one is 1
        probabilities /= probabilities.sum()
        if sampling.top_p < 1:
            probabilities = _nucleus(probabilities, sampling.top_p)
        at = np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right")
        possible = np.flatnonzero(probabilities)
        return int(kept[min(int(at), int(possible[-1]))])

    def _penalized(self, logits: Logits) -> Logits:
        sampling = self._sampling
        output = np.fromiter(self._output, dtype=np.int64, count=len(self._output))
        counted = sampling.frequency_penalty or sampling.presence_penalty
        penalized = sampling.repetition_penalty != 1 or sampling.logit_bias or counted
        if not penalized and self._constraint is None:
            return logits
        shaped = logits.copy()
        if sampling.repetition_penalty != 1:
            seen = np.union1d(self._prompt, output)
            value, ratio = shaped[seen], np.float32(sampling.repetition_penalty)
            shaped[seen] = np.where(value > 0, value / ratio, value * ratio)
        if counted and len(output):
            counts = np.fromiter(self._output.values(), dtype=np.float32, count=len(output))
            penalty = sampling.frequency_penalty * counts + sampling.presence_penalty
            shaped[output] -= penalty.astype(np.float32)
        shaped[self._biased] += self._biases
        if self._constraint is not None:
            shaped[~self._constraint.allowed(len(shaped))] = -np.inf
        return shaped


def _nucleus(probabilities: Probabilities, share: float) -> Probabilities:
    """The most probable ones that come to `share`, the others 0; they sum to 1 again."""
    count = _FIRST_LOOK
    while True:
        order = _largest(probabilities, count)
        reached = np.cumsum(probabilities[order])
        if len(order) == len(probabilities) or reached[-1] > share + 1e-9:  # beyond all rounding
            break
        count *= 16
    kept = order[reached - probabilities[order] < share]
    found = np.zeros_like(probabilities)
    found[kept] = probabilities[kept]
    found /= found.sum()
    return found


def _largest(values: NDArray[Any], count: int) -> NDArray[np.intp]:
    """Places of the `count` largest values, in order; of equal ones the first come first."""
    if count <= 0:
        return np.zeros(0, np.intp)
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")][:count]


def _logprob(logits: Logits, token: int, count: int) -> TokenLogprob:
    largest = np.float64(logits.max())
    total = largest + np.log(np.exp(logits.astype(np.float64) - largest).sum())
    top = tuple((int(at), float(logits[at] - total)) for at in _largest(logits, count))
    return TokenLogprob(token, float(logits[token] - total), top)
