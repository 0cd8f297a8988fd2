"""Answers as the engine makes them: several at a time, followed from the event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

from qexport.errors import QexportError
from qexport.runtime.constraint import Grammar
from qexport.runtime.engine import Engine
from qexport.runtime.sampler import Sampling
from qexport.runtime.scheduler import Piece, Sequence

__all__ = ["Answers", "Job"]

_MOST_BEHIND = 8192  # pieces that a client has not taken yet


@dataclass(frozen=True)
class Job:
    """One answer that is wanted."""

    prompt: list[int]
    sampling: Sampling
    grammar: Grammar | None = None


class Answers(AsyncIterator[tuple[int, Piece]]):
    """Pieces of all jobs, each with its job's number, as they come. `aclose` gives slots back.

    Pieces come from the engine's thread into the event loop's own queue, so that any number of
    requests may wait without a thread. Beginning them raises what `Engine.start` does; an answer
    that goes wrong raises its error, and the others end with it, as they do where nobody takes
    their pieces for long.
    """

    def __init__(self, engine: Engine, jobs: list[Job]) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._made = asyncio.Queue[tuple[int, Piece]]()
        self._open: dict[int, Sequence] = {}
        self.sequences: list[Sequence] = []
        try:
            for number, job in enumerate(jobs):
                self._start(number, job)
        except BaseException:
            self._cancel()
            raise

    def _start(self, number: int, job: Job) -> None:
        def emit(piece: Piece) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody listens
                self._loop.call_soon_threadsafe(self._put, number, piece)

        constraint = None if job.grammar is None else job.grammar.constraint()
        sequence = self._engine.start(job.prompt, job.sampling, emit, constraint)
        self._open[number] = sequence
        self.sequences.append(sequence)

    def _put(self, number: int, piece: Piece) -> None:
        behind = self._made.qsize()
        if behind == _MOST_BEHIND:
            piece = Piece("", 0, error=QexportError("the client reads too slowly."))
            self._cancel()
        if behind <= _MOST_BEHIND:
            self._made.put_nowait((number, piece))

    async def __anext__(self) -> tuple[int, Piece]:
        if not self._open and self._made.empty():
            raise StopAsyncIteration
        number, piece = await self._made.get()
        if piece.last:
            self._open.pop(number, None)
        if piece.error is not None:
            self._cancel()
            raise piece.error
        return number, piece

    async def aclose(self) -> None:
        """Stop what is not done, and forget what was made."""
        self._cancel()
        while not self._made.empty():
            self._made.get_nowait()

    def _cancel(self) -> None:
        for sequence in self._open.values():
            self._engine.cancel(sequence)
        self._open.clear()
