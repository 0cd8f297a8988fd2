"""The one thread that runs a decoder, and the tickets by which others follow their requests."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from qexport.errors import QexportError
from qexport.runtime.constraint import Constraint
from qexport.runtime.model import Decoder
from qexport.runtime.sampler import Sampler, Sampling
from qexport.runtime.scheduler import Piece, Scheduler, Sequence
from qexport.runtime.text import TextStream

__all__ = ["Engine", "Ticket"]


class Ticket(Iterator[Piece]):
    """One request's pieces as they are made; the last has a finish_reason.

    Raises what went wrong in place of the last piece. `close` gives the slot back early.
    """

    def __init__(self, engine: "Engine", prompt: list[int], sampling: Sampling) -> None:
        self._engine = engine
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._ended = False
        self.sequence = engine.start(prompt, sampling, self._pieces.put)

    def __next__(self) -> Piece:
        if self._ended:
            raise StopIteration
        piece = self._pieces.get()
        self._ended = piece.last
        if piece.error is not None:
            raise piece.error
        return piece

    def close(self) -> None:
        """Stop the work, if it is not done; who waits for a piece gets the end."""
        if not self._ended:
            self._engine.cancel(self.sequence)
            self._pieces.put(Piece("", 0, finish_reason="cancelled"))


class Engine:
    """Runs requests of many threads on one decoder, in a thread of its own that begins at once."""

    def __init__(
        self,
        decoder: Decoder,
        backend: Any,
        end_tokens: frozenset[int],
        *,
        waiting: int = 256,
    ) -> None:
        self.decoder, self.backend = decoder, backend
        self._scheduler = Scheduler(decoder, end_tokens, queue=waiting)
        self._changed = threading.Condition()
        self._cancelled: list[Sequence] = []
        self._ended: Exception | None = None
        self._failure: QexportError | None = None
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="qexport-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: list[int], sampling: Sampling) -> Ticket:
        """Begin a request. Raises InputError for one that can never run, QueueFullError."""
        return Ticket(self, prompt, sampling)

    def start(
        self,
        prompt: list[int],
        sampling: Sampling,
        emit: Callable[[Piece], None],
        constraint: Constraint | None = None,
    ) -> Sequence:
        """The same, with each piece given to `emit` in the engine's thread; it must not wait."""
        self._scheduler.check(prompt, sampling)
        text = TextStream(self.backend, prompt, sampling.stop)
        sampler = Sampler(sampling, prompt, constraint)
        sequence = Sequence(prompt, sampling, sampler, text, emit)
        with self._changed:
            if self._ended is not None:
                raise QexportError(str(self._ended))
            self._scheduler.submit(sequence)
            self._changed.notify()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Give a request's slot back before the next step."""
        with self._changed:
            self._cancelled.append(sequence)
            self._changed.notify()

    def close(self) -> None:
        """End the thread; requests that run fail."""
        with self._changed:
            self._ended = QexportError("the engine has ended.")
            self._changed.notify()
        self._thread.join()

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    def check_room(self) -> None:
        """Raise QueueFullError where no other request may wait."""
        self._scheduler.check_room()

    @property
    def ended(self) -> Exception | None:
        """Why nothing runs any more, if so."""
        return self._ended

    @property
    def stalled(self) -> float:
        """Seconds that the present step has taken; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def fail_all(self, error: QexportError) -> None:
        """End every request with an error before the next step."""
        with self._changed:
            self._failure = error
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._settle():
                self._step_began = time.monotonic()
                self._scheduler.step()
                self._step_began = None
        except BaseException as error:  # panics of Rust, too: nobody is left to wait for ever
            self._step_began = None
            self._ended = QexportError(f"the engine has crashed ({error!r}); start it anew.")
        with self._changed:
            assert self._ended is not None
            self._scheduler.cancel_all(self._ended)

    def _settle(self) -> bool:
        """Wait for work and carry out what was cancelled; False at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or self._failure or self._cancelled or self._scheduler.busy,
            )
            if self._failure is not None:
                self._scheduler.cancel_all(self._failure)
                self._failure = None
            for sequence in self._cancelled:
                self._scheduler.cancel(sequence)
            self._cancelled.clear()
            return self._ended is None
