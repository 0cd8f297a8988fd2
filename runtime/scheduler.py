"""Which tokens run in the next step: continuous batching over the slots of a decoder.

A request waits, gets a slot for all that it can come to (prompt and max_tokens), has its prompt run
in chunks beside the others' tokens, and then takes one token a step until it ends. Nothing here
knows threads; `engine` has the one that calls `step`.
"""

import copy
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qexport.errors import InputError, QexportError
from qexport.runtime.device_sampler import NO_TOKEN, Draw
from qexport.runtime.model import Decoder, Span
from qexport.runtime.sampler import Sampler, Sampling, TokenLogprob, no_numbers
from qexport.runtime.text import TextStream

__all__ = ["CHUNK", "ContextError", "Piece", "QueueFullError", "Scheduler", "Sequence"]

Tokens = NDArray[np.int32]


CHUNK = 256  # prompt tokens in a step


class ContextError(InputError):
    """A prompt and the tokens wanted are more than the model's context."""


class QueueFullError(QexportError):
    """As many requests wait as may; come back later."""


@dataclass(frozen=True)
class Piece:
    """New text, the tokens generated so far, and why it ended (`stop` or `length`) if it did.

    `error` ends a request that went wrong; `cached` counts prompt tokens that were in a slot;
    `made` is when, by the monotonic clock.
    """

    text: str
    tokens: int
    finish_reason: str | None = None
    token: int | None = None
    logprob: TokenLogprob | None = None
    error: Exception | None = None
    cached: int = 0
    made: float = field(default_factory=time.monotonic)

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Sequence:
    """One request: its tokens so far, and who is told of new ones."""

    prompt: list[int]
    sampling: Sampling
    sampler: Sampler
    text: TextStream
    emit: Callable[[Piece], None]
    generated: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # the prompt's and those generated
    slot: int | None = None
    ran: int = 0  # tokens that the slot's cache holds
    known: int = 0  # tokens that it had when the last of them ran
    cached: int = 0
    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None  # when it got a slot

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    def add(self, token: int) -> None:
        """One more token was generated."""
        self.generated.append(token)
        self.tokens.append(token)


@dataclass(frozen=True)
class _Held:
    """Tokens whose keys and values a slot holds, and how many their sequence had when they ran."""

    tokens: Tokens
    length: int


class Scheduler:
    """Runs sequences on a decoder, one step at a time. Not for several threads.

    queue   requests that may wait; chunk   prompt tokens in a step, beside those of running ones
    """

    def __init__(
        self,
        decoder: Decoder,
        end_tokens: frozenset[int],
        *,
        queue: int = 256,
        chunk: int = CHUNK,
    ) -> None:
        self._decoder = decoder
        self._end = end_tokens
        self._queue, self._chunk = queue, chunk if decoder.chunked else decoder.context
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission
        # what each free slot still holds, least recently used first
        nothing = _Held(np.zeros(0, np.int32), 0)
        self._free: dict[int, _Held] = dict.fromkeys(range(decoder.slots), nothing)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, sequence: Sequence) -> None:
        """Let a request wait. Raises InputError for one that can never run, QueueFullError."""
        self.check(sequence.prompt, sequence.sampling)
        self.check_room()
        self._waiting.append(sequence)

    def check_room(self) -> None:
        """Raise QueueFullError where no other request may wait."""
        waiting = len(self._waiting) - len(self._free)  # those that a slot is free for do not wait
        if waiting >= self._queue:
            raise QueueFullError(f"{waiting} requests are waiting already; try again later.")

    def check(self, prompt: list[int], sampling: Sampling) -> None:
        """Raise InputError for a request that can never run."""
        if not prompt:
            raise InputError("the prompt is empty.")
        if len(prompt) + sampling.max_tokens > self._decoder.context:  # before all are looked at
            raise ContextError(
                f"the prompt has {len(prompt)} tokens, and with {sampling.max_tokens} more it does "
                f"not fit the context of {self._decoder.context}."
            )
        if not 0 <= min(prompt) <= max(prompt) < self._decoder.vocabulary:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise InputError(f"token {wrong} is not in the model's vocabulary.")
        unknown = [token for token in sampling.logit_bias if token >= self._decoder.vocabulary]
        if unknown:
            raise InputError(f"logit_bias: token {unknown[0]} is not in the model's vocabulary.")

    def cancel(self, sequence: Sequence) -> None:
        """Forget a request; one that has ended already is none."""
        if sequence in self._running:
            self._release(sequence, sequence.ran)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def cancel_all(self, error: Exception) -> None:
        """End every request with an error."""
        for sequence in [*self._waiting, *self._running]:
            # a copy: each is raised elsewhere, with its own traceback
            self._fail(sequence, copy.copy(error))

    def step(self) -> None:
        """Admit what has room, run one step, and tell of each new token."""
        self._admit()
        spans = self._plan()
        if not spans:
            return
        results = self._forward(spans)
        for sequence, span in spans.items():
            if sequence.slot is None:  # it failed
                continue
            sequence.ran, sequence.known = span.start + len(span.tokens), span.length
            if span.logits:
                self._take(sequence, results[sequence])

    def _admit(self) -> None:
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            prompt = np.array(sequence.prompt, np.int32)
            slot = max(self._free, key=lambda slot: _worth(self._free[slot].tokens, prompt))
            held = self._free.pop(slot)
            shared = _shared(held.tokens, prompt)
            if shared:
                shared = self._decoder.reusable(slot, held.length, shared, len(prompt))
            # the last token is run in any case: its logits are wanted
            sequence.ran = sequence.cached = min(shared, len(prompt) - 1)
            sequence.slot = slot
            sequence.admitted = time.monotonic()
            self._running.append(sequence)

    def _plan(self) -> dict[Sequence, Span]:
        spans = {}
        room = self._chunk
        for sequence in self._running:
            assert sequence.slot is not None
            tokens, begin = sequence.tokens, sequence.ran
            end = len(tokens)
            if begin < len(sequence.prompt):
                if not self._decoder.chunked and end - begin > room:
                    continue  # whole, in a later step
                end = min(end, begin + room)
                room -= end - begin
            if end > begin:
                spans[sequence] = Span(
                    sequence.slot, begin, tokens[begin:end], len(tokens), end == len(tokens)
                )
        return spans

    def _forward(
        self, spans: dict[Sequence, Span], drawn: dict[Sequence, Draw] | None = None
    ) -> "dict[Sequence, np.ndarray | int]":
        """What `_run` gives. A sequence that breaks a step fails alone.

        The others take the step again, with the random numbers that they have `drawn` for it.
        """
        drawn = {} if drawn is None else drawn
        try:
            return self._run(spans, drawn)
        except Exception as error:  # a fault of one must not end the others
            if len(spans) == 1:
                self._fail(next(iter(spans)), error)
                return {}
        found = {}
        for sequence, span in spans.items():
            found.update(self._forward({sequence: span}, drawn))
        return found

    def _run(
        self, spans: dict[Sequence, Span], drawn: dict[Sequence, Draw]
    ) -> "dict[Sequence, np.ndarray | int]":
        """Logits of each sequence that wants them, or its token where the decoder can choose."""
        wanting = [sequence for sequence, span in spans.items() if span.logits]
        work = list(spans.values())
        if self._decoder.draws and all(sequence.sampler.plain for sequence in wanting):
            for sequence in wanting:
                if sequence not in drawn:
                    drawn[sequence] = sequence.sampler.draw()
            tokens = self._decoder.choose(work, [drawn[sequence] for sequence in wanting])
            return dict(zip(wanting, tokens, strict=True))
        return dict(zip(wanting, self._decoder.forward(work).numpy(), strict=True))

    def _take(self, sequence: Sequence, result: "np.ndarray | int") -> None:
        """Choose a token from logits, if that is not done yet, and tell of it."""
        try:
            if isinstance(result, int):
                if result == NO_TOKEN:
                    raise no_numbers()
                token, logprob = result, None
            else:
                token, logprob = sequence.sampler.choose(result)
            sequence.add(token)
            piece = self._piece(sequence, token, logprob)
        except Exception as error:  # NaN, or a tokenizer that trips
            self._fail(sequence, error)
            return
        except BaseException as error:
            if isinstance(error, (SystemExit, KeyboardInterrupt)):
                raise
            self._fail(sequence, QexportError(f"a library has panicked ({error})."))  # Rust's
            return
        if piece.last:
            self._release(sequence, sequence.ran)
        sequence.emit(piece)

    def _piece(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Piece:
        count, text = len(sequence.generated), ""
        reason = None
        if token in self._end and not sequence.sampling.ignore_end:
            text, reason = sequence.text.rest(), "stop"
        else:
            text = sequence.text.add(token)
            if sequence.text.stopped:
                reason = "stop"
            elif count >= sequence.sampling.max_tokens:
                text, reason = text + sequence.text.rest(), "length"
        return Piece(text, count, reason, token, logprob, cached=sequence.cached)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        if sequence in self._running:
            self._release(sequence, 0)  # nobody knows what a failed step left in the cache
        else:
            self.cancel(sequence)
        sequence.emit(Piece("", len(sequence.generated), error=error))

    def _release(self, sequence: Sequence, held: int) -> None:
        assert sequence.slot is not None
        self._running.remove(sequence)
        left = np.array(sequence.tokens[:held], np.int32)
        self._free[sequence.slot] = _Held(left, sequence.known)
        sequence.slot = None


def _worth(held: Tokens, prompt: Tokens) -> int:
    """What a slot's tokens save; nothing where they are the better part of neither side.

    A few tokens that every prompt begins with are no reason to lose a long conversation.
    """
    shared = _shared(held, prompt)
    return shared if 2 * shared >= min(len(held), len(prompt)) else 0


def _shared(held: Tokens, prompt: Tokens) -> int:
    """Tokens that both begin with."""
    both = min(len(held), len(prompt))
    differ = np.flatnonzero(held[:both] != prompt[:both])
    return int(differ[0]) if len(differ) else both
