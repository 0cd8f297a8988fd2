"""The process that serves: connections, signals, the end."""

import asyncio
import os
import signal
import socket
import threading
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from qexport.runtime.server.errors import UnavailableError
from qexport.runtime.server.limits import Limits

__all__ = ["run"]

_LARGEST_HEAD = 32 << 10  # bytes of a request line and its headers
_AFTER_DRAIN = 5  # seconds for streams to end after their answers were


def run(app: FastAPI, listener: socket.socket, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT: running answers then have `drain_seconds`; a second signal
    ends at once."""
    config = uvicorn.Config(
        app,
        http=_protocol(limits),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=int(limits.idle_seconds),
        timeout_graceful_shutdown=int(limits.drain_seconds) + _AFTER_DRAIN,
        h11_max_incomplete_event_size=_LARGEST_HEAD,
    )
    _Server(config, app, limits).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, app: FastAPI, limits: Limits) -> None:
        super().__init__(config)
        self._service, self._limits = app.state.service, limits

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self._service.draining = True
        late = UnavailableError("the server was shut down before the answer was done.")
        timer = threading.Timer(
            self._limits.drain_seconds, self._service.generator.engine.fail_all, (late,)
        )
        timer.daemon = True
        timer.start()
        self.should_exit = True
        self._captured_signals = [signal.SIGTERM] if sig == signal.SIGTERM else [sig]


def _protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's h11, which closes connections whose request does not come."""

    class Protocol(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def handle_events(self) -> None:
            running = self.cycle is not None and not self.cycle.response_complete
            super().handle_events()
            now = self.cycle is not None and not self.cycle.response_complete
            if now and not running and self._late is not None:
                self._late.cancel()
                self._late = None

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self.transport.is_closing() and self._late is None:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._late is not None:
                self._late.cancel()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self._late = self.loop.call_later(
                limits.receive_seconds + limits.idle_seconds, self._give_up
            )

        def _give_up(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

    return Protocol
