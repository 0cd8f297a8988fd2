"""The scheduler under random arrivals, cancels and ends: every request ends exactly once."""

from collections.abc import Sequence as Many
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tokenizers import Tokenizer, models
from torch import Tensor

from qexport.errors import InputError
from qexport.runtime.device_sampler import NO_TOKEN, Draw
from qexport.runtime.model import Decoder, Span
from qexport.runtime.sampler import Sampler, Sampling
from qexport.runtime.scheduler import Piece, QueueFullError, Scheduler, Sequence
from qexport.runtime.text import TextStream

END = 0
VOCABULARY = 40
BREAKS = 39  # a token that breaks the step it is run in
WORDS = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))


class Counting(Decoder):
    """A decoder whose next token is a function of all tokens in the slot, which it checks."""

    def __init__(self, slots: int, context: int) -> None:
        self.slots, self.context, self.vocabulary, self.kernels = slots, context, VOCABULARY, ""
        self.held: list[list[int]] = [[] for _ in range(slots)]

    def forward(self, spans: Many[Span]) -> Tensor:
        assert len({span.slot for span in spans}) == len(spans)
        if any(BREAKS in span.tokens for span in spans):
            raise RuntimeError("broken")
        rows = []
        for span in spans:
            assert len(span.tokens) > 0
            assert span.start <= len(self.held[span.slot]), "what the slot lacks is not skipped"
            assert span.start + len(span.tokens) <= self.context
            self.held[span.slot][span.start :] = span.tokens
            if span.logits:
                row = torch.zeros(VOCABULARY)
                row[following(self.held[span.slot])] = 1
                rows.append(row)
        return torch.stack(rows) if rows else torch.empty(0, VOCABULARY)


class Choosing(Counting):
    """The same, choosing tokens itself; a step that chooses logits' way is counted."""

    draws = True
    forwards = 0

    def forward(self, spans: Many[Span]) -> Tensor:
        self.forwards += 1
        return super().forward(spans)

    def choose(self, spans: Many[Span], draws: Many[Draw]) -> list[int]:
        logits = super().forward(spans)
        assert len(logits) == len(draws)
        tokens: list[int] = logits.argmax(-1).tolist() if len(logits) else []
        return tokens


def following(tokens: list[int]) -> int:
    return (sum((i + 1) * token for i, token in enumerate(tokens)) * 7 + len(tokens)) % 38


def expected(prompt: list[int], most: int) -> list[int]:
    made: list[int] = []
    while len(made) < most:
        made.append(following(prompt + made))
        if made[-1] == END:
            break
    return made


class Machine(RuleBasedStateMachine):
    """Requests come, are cancelled, break and end in any order."""

    @initialize(slots=st.integers(1, 4), queue=st.integers(0, 5), chunk=st.integers(1, 16))
    def begin(self, slots: int, queue: int, chunk: int) -> None:
        self.decoder = (Counting, Choosing)[chunk % 2](slots, 48)
        self.scheduler = Scheduler(self.decoder, frozenset([END]), queue=queue, chunk=chunk)
        self.queue = queue
        self.open: list[Sequence] = []
        self.pieces: dict[Sequence, list[Piece]] = {}

    @rule(
        prompt=st.lists(st.sampled_from([1, 1, 2, 3, BREAKS]), max_size=30),
        most=st.integers(1, 25),
    )
    def arrive(self, prompt: list[int], most: int) -> None:
        pieces: list[Piece] = []
        sampling = Sampling(max_tokens=most)
        text = TextStream(WORDS, prompt, ())
        sequence = Sequence(prompt, sampling, Sampler(sampling, prompt), text, pieces.append)
        try:
            self.scheduler.submit(sequence)
        except InputError:
            assert not prompt or len(prompt) + most > 48
            return
        except QueueFullError:
            slots = len(self.scheduler._free)  # those that wait for one of these do not count
            assert self.scheduler.waiting == self.queue + slots
            return
        self.open.append(sequence)
        self.pieces[sequence] = pieces

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.open))
        self.scheduler.cancel(sequence)
        self.scheduler.cancel(sequence)
        self.open.remove(sequence)
        self.pieces.pop(sequence)

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.scheduler.step()
        for sequence in list(self.open):
            if any(piece.last for piece in self.pieces[sequence]):
                self.ended(sequence)

    def ended(self, sequence: Sequence) -> None:
        pieces = self.pieces.pop(sequence)
        self.open.remove(sequence)
        assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        if BREAKS in sequence.prompt:
            assert isinstance(pieces[-1].error, RuntimeError)
            return
        want = expected(sequence.prompt, sequence.sampling.max_tokens)
        assert [piece.token for piece in pieces] == want
        assert pieces[-1].finish_reason == ("stop" if want[-1] == END else "length")

    @invariant()
    def slots_are_kept(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        held = [sequence.slot for sequence in self.scheduler._running]
        free = list(self.scheduler._free)
        assert sorted([*held, *free]) == list(range(self.decoder.slots))  # type: ignore[type-var]
        assert len(self.open) == self.scheduler.running + self.scheduler.waiting

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(400):
            self.scheduler.step()
        for sequence in list(self.open):
            self.ended(sequence)
        assert not self.scheduler.busy
        assert len(self.scheduler._free) == self.decoder.slots


TestScheduler = Machine.TestCase
# 200 runs of 50 rules, most of them several steps: more than 10,000 steps
TestScheduler.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def run(scheduler: Scheduler, prompts: list[list[int]], most: int = 5) -> list[list[Piece]]:
    found: list[list[Piece]] = [[] for _ in prompts]
    for prompt, pieces in zip(prompts, found, strict=True):
        sampling = Sampling(max_tokens=most, ignore_end=True)
        text = TextStream(WORDS, prompt, ())
        scheduler.submit(Sequence(prompt, sampling, Sampler(sampling, prompt), text, pieces.append))
    while scheduler.busy:
        scheduler.step()
    return found


def test_the_longest_prefix_is_reused() -> None:
    scheduler = Scheduler(Counting(3, 48), frozenset(), chunk=64)
    run(scheduler, [[1, 2, 3, 4], [5, 6, 7, 8], [1, 2]])
    found = run(scheduler, [[5, 6, 7, 9], [1, 2, 3, 9]])
    assert [pieces[0].cached for pieces in found] == [3, 3]
    assert run(scheduler, [[1, 2, 3, 9]])[0][0].cached == 3  # one token is run for its logits


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    decoder = Counting(2, 48)
    scheduler = Scheduler(decoder, frozenset(), chunk=4)
    pieces: list[list[Piece]] = [[], []]
    for prompt, told in zip(([1], [2] * 40), pieces, strict=True):
        sampling = Sampling(max_tokens=8, ignore_end=True)
        text = TextStream(WORDS, prompt, ())
        scheduler.submit(Sequence(prompt, sampling, Sampler(sampling, prompt), text, told.append))
    for _ in range(8):
        scheduler.step()
    assert (len(pieces[0]), len(pieces[1])) == (8, 0)


def request(scheduler: Scheduler, prompt: list[int], most: int = 1) -> list[Piece]:
    pieces: list[Piece] = []
    sampling = Sampling(max_tokens=most)
    text = TextStream(WORDS, prompt, ())
    scheduler.submit(Sequence(prompt, sampling, Sampler(sampling, []), text, pieces.append))
    return pieces


def test_a_prompt_that_is_not_to_be_split_waits_for_room() -> None:
    decoder = Counting(2, 48)
    decoder.chunked = False
    scheduler = Scheduler(decoder, frozenset())
    told = [request(scheduler, [2] * 30), request(scheduler, [3] * 30)]
    scheduler.step()
    assert (len(told[0]), decoder.held[1]) == (1, [])
    scheduler.step()
    assert len(told[1]) == 1


def test_a_decoder_may_take_nothing_over() -> None:
    decoder = Counting(1, 48)
    scheduler = Scheduler(decoder, frozenset())
    for number, (expected_share, may) in enumerate(((0, True), (9, True), (0, False))):
        asked: list[tuple[int, ...]] = []

        def reusable(*numbers: int, may: bool = may, asked: Any = asked) -> int:
            asked.append(numbers)
            return numbers[2] if may else 0

        decoder.reusable = reusable  # type: ignore[method-assign, assignment]
        told = request(scheduler, [2] * 10)
        scheduler.step()
        assert told[-1].cached == expected_share
        assert asked == ([(0, 10, 10, 10)] if number else [])


def test_keys_of_a_prompt_that_was_left_are_known_by_its_whole_length() -> None:
    """longrope turns the keys of a long prompt's first chunk by what is still to come."""
    decoder = Counting(1, 48)
    scheduler = Scheduler(decoder, frozenset(), chunk=4)
    asked = []

    def reusable(*numbers: int) -> int:
        asked.append(numbers)
        return 0

    decoder.reusable = reusable  # type: ignore[method-assign, assignment]
    request(scheduler, [2] * 40)
    scheduler.step()
    scheduler.cancel(scheduler._running[0])
    request(scheduler, [2] * 10)
    scheduler.step()
    assert asked == [(0, 40, 4, 10)]


def test_a_long_conversation_is_not_lost_to_a_few_tokens_in_common() -> None:
    decoder = Counting(2, 48)
    scheduler = Scheduler(decoder, frozenset())
    first = [1, *range(2, 32)]
    request(scheduler, first)
    scheduler.step()
    request(scheduler, [1, 2, *[5] * 20])  # begins the same: goes to the empty slot
    scheduler.step()
    again = request(scheduler, [*first, 7])
    scheduler.step()
    assert again[-1].cached == len(first)


def test_a_failed_step_leaves_an_empty_slot() -> None:
    decoder = Counting(1, 48)
    scheduler = Scheduler(decoder, frozenset(), chunk=4)
    broken = request(scheduler, [2, 2, 2, 2, BREAKS])
    for _ in range(2):
        scheduler.step()
    assert broken[-1].error is not None
    fine = request(scheduler, [2, 2, 2])
    scheduler.step()
    assert (fine[-1].cached, fine[-1].error) == (0, None)


@pytest.mark.parametrize("chunked", [True, False])
def test_prompts_are_run_in_chunks_where_they_may(chunked: bool) -> None:
    decoder = Counting(1, 48)
    decoder.chunked = chunked
    scheduler = Scheduler(decoder, frozenset(), chunk=4)
    pieces: list[Piece] = []
    sampling = Sampling(max_tokens=1)
    text = TextStream(WORDS, [2] * 9, ())
    scheduler.submit(Sequence([2] * 9, sampling, Sampler(sampling, []), text, pieces.append))
    scheduler.step()
    assert len(pieces) == (0 if chunked else 1)


def start(scheduler: Scheduler, prompt: list[int], **wishes: Any) -> list[Piece]:
    pieces: list[Piece] = []
    sampling = Sampling(max_tokens=3, **wishes)
    text = TextStream(WORDS, prompt, ())
    sequence = Sequence(prompt, sampling, Sampler(sampling, prompt), text, pieces.append)
    scheduler.submit(sequence)
    return pieces


def finish(scheduler: Scheduler) -> None:
    for _ in range(20):
        scheduler.step()
    assert not scheduler.busy


def test_logits_come_back_only_where_they_are_needed() -> None:
    """Logprobs and penalties need them; the tokens are the same."""
    decoder = Choosing(2, 48)
    scheduler = Scheduler(decoder, frozenset())
    plain = start(scheduler, [1, 2])
    finish(scheduler)
    assert decoder.forwards == 0
    for wishes in ({"logprobs": 1}, {"logit_bias": {38: -1.0}}):
        before = decoder.forwards
        shaped = start(scheduler, [1, 2], **wishes)
        beside = start(scheduler, [1, 2])
        finish(scheduler)
        assert decoder.forwards > before
        for pieces in (shaped, beside):
            assert [piece.token for piece in pieces] == [piece.token for piece in plain]


def test_a_choice_that_is_no_token_ends_one_request() -> None:
    class Failing(Choosing):
        def choose(self, spans: Many[Span], draws: Many[Draw]) -> list[int]:
            tokens = super().choose(spans, draws)
            return [
                NO_TOKEN if span.slot == 1 else t for span, t in zip(spans, tokens, strict=True)
            ]

    scheduler = Scheduler(Failing(2, 48), frozenset())
    both = [start(scheduler, [1, 2]), start(scheduler, [2, 1])]
    finish(scheduler)
    errors = [str(pieces[-1].error) for pieces in both]
    assert sorted(error[:18] for error in errors) == ["None", "the model gave NaN"]


def test_a_broken_step_costs_others_no_random_number() -> None:
    """Who takes a step again, without the one that broke it, takes it with the same numbers."""

    class Drawing(Choosing):
        numbers: dict[int, list[float]]

        def choose(self, spans: Many[Span], draws: Many[Draw]) -> list[int]:
            tokens = super().choose(spans, draws)
            for span, draw in zip(spans, draws, strict=True):
                self.numbers.setdefault(span.slot, []).append(draw.number)
            return tokens

    found = []
    for others in ([], [[BREAKS]]):
        decoder = Drawing(2, 48)
        decoder.numbers = {}
        scheduler = Scheduler(decoder, frozenset())
        start(scheduler, [1, 2], temperature=1.0, seed=1)
        for prompt in others:
            start(scheduler, prompt)
        finish(scheduler)
        found.append(max(decoder.numbers.values(), key=len))
    assert found[0] == found[1]


def test_a_huge_top_k_is_all_tokens() -> None:
    assert Draw(temperature=1.0, top_k=10**400).row(300) == Draw(temperature=1.0).row(300)
