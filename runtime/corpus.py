"""Training text that a model writes itself, for users who have none (LLM-QAT, arXiv 2305.17888).

Every document begins with a token drawn from the whole vocabulary, goes on greedily for a few
tokens, so that it finds a subject, and is sampled from there: its words are as frequent as the
model has them, which is what a student of that model has to learn.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count

from qexport.runtime.generator import Generator
from qexport.runtime.sampler import Sampling

__all__ = ["CorpusSettings", "generated_documents"]


@dataclass(frozen=True)
class CorpusSettings:
    """How documents are made.

    length       tokens of a document at most: it may end before
    greedy       tokens after the first that are the likeliest ones
    temperature  of the others; top_p: their nucleus
    """

    length: int
    greedy: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def generated_documents(
    generator: Generator, settings: CorpusSettings, first: int = 0
) -> Iterator[tuple[str, int]]:
    """Texts and their numbers of tokens, from document `first` on, without an end.

    A document is a function of the seed and its number, as far as sums do not depend on what else
    is in a batch.
    """
    parallel = 2 * generator.decoder.slots
    special = set(generator.tokenizer.all_special_ids)
    ordinary = [token for token in range(len(generator.tokenizer)) if token not in special]
    write = partial(_document, generator, settings, ordinary)
    numbers = count(first)
    with ThreadPoolExecutor(parallel) as pool:
        waiting = [pool.submit(write, next(numbers)) for _ in range(parallel)]
        try:
            while True:
                yield waiting.pop(0).result()
                waiting.append(pool.submit(write, next(numbers)))
        finally:
            for one in waiting:
                one.cancel()


def _document(
    generator: Generator, settings: CorpusSettings, ordinary: list[int], number: int
) -> tuple[str, int]:
    """One that begins with an `ordinary` token."""
    dice = random.Random(f"{settings.seed} {number}")
    tokens = [dice.choice(ordinary)]
    greedy = Sampling(max_tokens=settings.greedy)
    sampled = Sampling(
        max_tokens=max(1, settings.length - settings.greedy - 1),
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=dice.getrandbits(32),
    )
    for sampling in (greedy, sampled):
        pieces = list(generator.stream(tokens, sampling))
        tokens += [piece.token for piece in pieces if piece.token is not None]
        if pieces[-1].finish_reason == "stop":
            break
    text: str = generator.tokenizer.decode(tokens, skip_special_tokens=True)
    return text, len(tokens)
