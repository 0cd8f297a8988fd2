"""The process that serves: connections, signals, the end."""

import asyncio
import gc
import json
import os
import socket
from dataclasses import replace
from types import FrameType
from typing import Any, ClassVar

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from qexport.runtime.server.errors import UnavailableError, error_body
from qexport.runtime.server.limits import Limits
from qexport.runtime.server.metrics import Metrics

__all__ = ["run"]

_LARGEST_HEAD = 32 << 10  # bytes of a request line and its headers
_MOST_FILES = 1 << 16
_OTHER_FILES = 64  # the model's, pipes, the log
_AFTER_DRAIN = 5  # seconds for streams to end after their answers were
_REFUSAL = json.dumps(error_body("this is not HTTP.")).encode()
_NOT_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_REFUSAL), _REFUSAL)
)


def run(app: FastAPI, listener: socket.socket, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT: running answers then have `drain_seconds`; a second signal
    ends at once."""
    gc.collect()
    gc.freeze()  # what was imported stays: looking through all of it stops answers for 0.2 s
    limits = replace(limits, connections=max(1, min(limits.connections, _files() - _OTHER_FILES)))
    config = uvicorn.Config(
        app,
        http=_Protocol.shared_by(limits, app.state.service.metrics),
        ws="none",
        lifespan="off",
        log_level="error",  # its warnings are of what anyone may send, as often as they like
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=int(limits.idle_seconds),
        timeout_graceful_shutdown=int(limits.drain_seconds) + _AFTER_DRAIN,
        h11_max_incomplete_event_size=_LARGEST_HEAD,
    )
    try:
        _Server(config, app, limits).run(sockets=[listener])
    finally:
        gc.unfreeze()  # libraries complain of what is left over at the end


def _files() -> int:
    """Files that the process may have open, after asking for as many as it can get."""
    try:
        import resource
    except ImportError:  # Windows
        return _MOST_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MOST_FILES if soft == resource.RLIM_INFINITY else soft


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, app: FastAPI, limits: Limits) -> None:
        super().__init__(config)
        self._service, self._limits = app.state.service, limits
        self._engine = self._service.generator.engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In a signal's handler, which may have caught any lock: nothing here takes one."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        self._service.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        late = UnavailableError("the server was shut down before the answer was done.")
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._limits.drain_seconds, self._engine.fail_all, late)
        await super().shutdown(sockets)
        timer.cancel()


class _Protocol(H11Protocol):
    """uvicorn's h11, which ends connections whose request does not come, or that take nothing.

    They are aborted: closing would wait for what the client does not take. uvicorn makes one for
    each connection; what they share is `shared_by`'s.
    """

    limits: ClassVar[Limits]
    metrics: ClassVar[Metrics]

    @classmethod
    def shared_by(cls, limits: Limits, metrics: Metrics) -> "type[_Protocol]":
        """The class for a server with these limits."""
        return type("_Protocol", (cls,), {"limits": limits, "metrics": metrics})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._late: asyncio.TimerHandle | None = None
        self._slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
            return
        self._wait()

    def handle_events(self) -> None:
        super().handle_events()
        if self._answering:
            self._stop_waiting()

    def send_400_response(self, msg: str) -> None:
        self.metrics.answered("none", "other", 400)
        self.transport.write(_NOT_HTTP)
        self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._answering and not self.transport.is_closing():
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._slow = self.loop.call_later(self.limits.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._slow is not None:
            self._slow.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._slow is not None:
            self._slow.cancel()
        super().connection_lost(exc)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._stop_waiting()
        seconds = self.limits.receive_seconds + self.limits.idle_seconds
        self._late = self.loop.call_later(seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
