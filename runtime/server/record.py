"""What is noted of each request, for the metrics and the log."""

import json
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qexport.errors import QexportError
from qexport.runtime.scheduler import Piece, Sequence
from qexport.runtime.server.errors import answer_of
from qexport.runtime.server.metrics import Metrics
from qexport.runtime.server.replies import Counts
from qexport.runtime.server.request_log import RequestLog

__all__ = ["Record", "Recorder"]

_LONGEST_PATH = 100
_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH")
CLIENT_LEFT = 499  # nginx' number: nobody was there to get another one


class Recorder:
    """Notes every request, whatever becomes of it. Plain ASGI, outside of everything else."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: RequestLog | None) -> None:
        self._app, self._metrics, self._log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        # whatever can be got has a head too; uvicorn leaves the body away
        scope = {**scope, "method": "GET" if method == "HEAD" else method}
        record = Record(scope, method, self._metrics, self._log)
        scope.setdefault("state", {})["record"] = record

        async def sending(message: Message) -> None:
            record.sent(message)
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:
            record.broke()
            raise
        finally:
            record.end()


class Record:
    """One request as it goes. `/metrics` and the log get it at its end."""

    def __init__(self, scope: Scope, method: str, metrics: Metrics, log: RequestLog | None) -> None:
        self.id = uuid.uuid4().hex
        self._method = method
        self._scope, self._metrics, self._log = scope, metrics, log
        self._began = self._asked = time.monotonic()
        self._status = CLIENT_LEFT  # until there is another
        self._error: str | None = None
        self._facts: dict[str, Any] = {}
        self._sequences: list[Sequence] = []
        self._counts = Counts(0)
        self._pieces: dict[int, Piece] = {}  # the last one of each answer
        self._first: dict[int, float] = {}

    def asked(self, stream: bool, prompt: Callable[[], Any]) -> None:
        """The request has come, and is one for answers to `prompt()`."""
        self._asked = time.monotonic()
        self._facts["stream"] = stream
        if self._log is not None and self._log.with_prompts:
            self._facts["prompt"] = prompt()

    def begun(self, answer: str, sequences: list[Sequence], counts: Counts) -> None:
        """Its answers are being made, under the id `answer`."""
        self._facts["id"] = answer
        self._sequences, self._counts = sequences, counts

    def piece(self, number: int, piece: Piece) -> None:
        """One answer has gone on."""
        last = self._pieces.get(number)
        if last is None:
            self._first[number] = piece.made
            self._metrics.first_token.observe(piece.made - self._asked)
        else:
            self._metrics.between_tokens.observe(piece.made - last.made)
        self._pieces[number] = piece

    def failed(self, error: QexportError) -> None:
        """What the client could only be told in the middle of a stream."""
        self._status, self._error = answer_of(error).status_code, str(error)

    def broke(self) -> None:
        """A fault of ours, which is answered further out."""
        self._status, self._error = 500, "internal error"

    def sent(self, message: Message) -> None:
        """What goes to the client; what it is told is wrong is noted."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self.id.encode())]
        elif self._status >= 400 and self._error is None:
            self._error = _message(message.get("body", b""))

    def end(self) -> None:
        """The request is over, one way or another."""
        now, method = time.monotonic(), self._method
        done = sum(piece.finish_reason is not None for piece in self._pieces.values())
        if self._status < 400 and done < len(self._sequences):
            self._status = CLIENT_LEFT
        if self._status == CLIENT_LEFT:
            self._error = "the client left"
        path = getattr(self._scope.get("route"), "path", "none")
        self._metrics.answered(path, method if method in _METHODS else "other", self._status)
        if self._sequences:
            self._count()
        if self._log is not None and (method == "POST" or self._status >= 400):
            self._log.write(self._line(now))

    def _count(self) -> None:
        metrics = self._metrics
        for number, sequence in enumerate(self._sequences):
            piece = self._pieces.get(number)
            if piece is None or piece.finish_reason is None:
                metrics.success("abort" if self._status == CLIENT_LEFT else "error")
            else:
                metrics.success(piece.finish_reason)
                metrics.whole.observe(piece.made - self._asked)
                if piece.tokens > 1:
                    spent = piece.made - self._first[number]
                    metrics.per_token.observe(spent / (piece.tokens - 1))
            metrics.generation_tokens.inc(len(sequence.generated))
            if sequence.admitted is not None:
                metrics.prompt_tokens.inc(len(sequence.prompt))
                metrics.cached_tokens.inc(sequence.cached)
                metrics.queued.observe(sequence.admitted - sequence.arrived)

    def _line(self, now: float) -> dict[str, Any]:
        client = self._scope.get("client")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request": self.id,
            "client": client[0] if client else None,
            "method": self._method[:_LONGEST_PATH],
            "route": self._scope["path"][:_LONGEST_PATH],
            "status": self._status,
            "error": self._error,
            "seconds": round(now - self._began, 6),
            **self._facts,
        }
        if not self._sequences:
            return line
        first = min(self._first.values(), default=None)
        ends = [self._pieces[n].finish_reason for n in sorted(self._pieces)]
        return {
            **line,
            "finish_reason": ends[0] if len(ends) == 1 else ends,
            "prompt_tokens": self._counts.prompt,
            "cached_tokens": self._counts.cached,
            "completion_tokens": self._counts.completion,
            "ttft_s": None if first is None else round(first - self._asked, 6),
        }


def _message(body: bytes) -> str | None:
    """The message of one of our errors."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
