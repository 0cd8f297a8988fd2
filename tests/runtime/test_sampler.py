"""Choosing tokens, against what the definitions say."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.errors import InputError, QexportError
from qexport.runtime.sampler import Sampler, Sampling, _largest, _nucleus

LOGITS = np.log(np.array([0.1, 0.5, 0.15, 0.05, 0.2], dtype=np.float32))


def drawn(count: int = 4000, **fields: object) -> Counter[int]:
    """How often each token comes first."""
    found: Counter[int] = Counter()
    sampling = Sampling(**{"temperature": 1.0, "seed": 0, **fields})  # type: ignore[arg-type]
    sampler = Sampler(sampling, [])
    for _ in range(count):
        sampler._output.clear()
        found[sampler.choose(LOGITS)[0]] += 1
    return found


def test_shares_are_the_models() -> None:
    found = drawn(20000)
    for token, share in enumerate((0.1, 0.5, 0.15, 0.05, 0.2)):
        assert abs(found[token] / 20000 - share) < 0.015


def test_temperature_sharpens() -> None:
    found = drawn(temperature=0.5)
    assert abs(found[1] / 4000 - 0.25 / 0.3250) < 0.03


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 2}, {1, 4}),
        ({"top_k": 1}, {1}),
        ({"top_p": 0.69}, {1, 4}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.29}, {1, 2, 4}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.9}, {1, 2, 4}),
        ({"temperature": 0.0}, {1}),
        ({"logit_bias": {1: -100, 4: -100}}, {0, 2, 3}),
        ({"logit_bias": {3: 100}}, {3}),
    ],
)
def test_truncation(fields: dict[str, object], kept: set[int]) -> None:
    assert set(drawn(1500, **fields)) == kept


def test_penalties() -> None:
    logits = np.array([1.0, 2.0, -1.0, 0.5], dtype=np.float32)
    before = logits.copy()
    sampler = Sampler(Sampling(repetition_penalty=4.0), [1])
    assert sampler.choose(logits)[0] == 0  # 2 / 4 is below 1
    assert [sampler.choose(logits)[0] for _ in range(2)] == [1, 1]  # 1 / 4 is below 2 / 4
    sampler = Sampler(Sampling(frequency_penalty=0.6), [1])  # of the output alone
    assert [sampler.choose(logits)[0] for _ in range(5)] == [1, 1, 0, 1, 3]
    sampler = Sampler(Sampling(presence_penalty=1.2), [])
    assert [sampler.choose(logits)[0] for _ in range(3)] == [1, 0, 1]
    assert (logits == before).all()


def test_a_seed_says_all() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [])
        return [sampler.choose(LOGITS)[0] for _ in range(50)]

    assert run(3) == run(3) != run(4)
    assert run(None) != run(None)


def test_logprobs() -> None:
    token, found = Sampler(Sampling(logprobs=2, logit_bias={1: -100}), []).choose(LOGITS)
    assert found is not None
    assert token == found.token == 4
    assert abs(found.logprob - np.log(0.2)) < 1e-6  # the model's own, whatever the bias
    assert [t for t, _ in found.top] == [1, 4]
    assert Sampler(Sampling(logprobs=0), []).choose(LOGITS)[1].top == ()  # type: ignore[union-attr]
    assert Sampler(Sampling(), []).choose(LOGITS)[1] is None


def test_what_is_no_number() -> None:
    for broken in (np.nan, np.inf):
        logits = LOGITS.copy()
        logits[3] = broken
        with pytest.raises(QexportError, match="gave NaN"):
            Sampler(Sampling(), []).choose(logits)
    with pytest.raises(QexportError, match="gave NaN"):
        Sampler(Sampling(), []).choose(np.full(4, -np.inf, dtype=np.float32))
    masked = np.array([-np.inf, 1.0], dtype=np.float32)
    assert Sampler(Sampling(temperature=1.0), []).choose(masked)[0] == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"frequency_penalty": 3},
        {"presence_penalty": float("nan")},
        {"logit_bias": {1: 101}},
        {"logprobs": 21},
        {"stop": ("",)},
        {"stop": ("a",) * 17},
        {"max_tokens": 0},
    ],
)
def test_what_makes_no_sense(fields: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Sampling(**fields)  # type: ignore[arg-type]


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.9999), st.integers(0, 12))
def test_what_is_sorted_in_part_is_as_if_it_were_in_whole(
    seed: int, share: float, count: int
) -> None:
    """Equal values, of which there are many here, in the order of their tokens."""
    random = np.random.default_rng(seed)
    logits = random.integers(-6, 6, 2000).astype(np.float32)
    whole = np.argsort(-logits, kind="stable")[:count]
    assert _largest(logits, count).tolist() == whole.tolist()
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = set(order[before < share].tolist())
    found = _nucleus(probabilities, share)
    assert set(np.flatnonzero(found).tolist()) == kept
    assert abs(found.sum() - 1) < 1e-12
