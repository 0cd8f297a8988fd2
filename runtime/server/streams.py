"""Server-sent events of answers."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import anyio
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qexport.errors import QexportError
from qexport.runtime.server.answers import Answers
from qexport.runtime.server.errors import error_body
from qexport.runtime.server.replies import Reply
from qexport.runtime.server.service import Exchange

__all__ = ["EventStream", "event", "openai_events"]


class EventStream(StreamingResponse):
    """A stream that is closed with its connection, wherever the client's leaving caught it."""

    def __init__(self, events: AsyncGenerator[str, None], answers: Answers) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._answers = events, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()
                await self._answers.aclose()  # also where no event was ever asked for


async def openai_events(
    exchange: Exchange, reply: Reply, with_usage: bool, echoes: list[str] | None = None
) -> AsyncGenerator[str, None]:
    """Chunks of chats and completions. An error after the first byte becomes an event."""
    extra = {"usage": None} if with_usage else {}
    try:
        for index in range(len(exchange.choices)):
            opening = reply.opening(index)
            if opening is not None:
                yield event({**opening, **extra})
            if echoes is not None:
                yield event({**reply.echo(index, echoes[index]), **extra})
        async with aclosing(exchange.deltas()) as deltas:
            async for index, delta in deltas:
                for chunk in reply.chunks(index, delta):
                    yield event({**chunk, **extra})
        if with_usage:
            yield event(reply.closing(exchange.counts))
    except QexportError as error:
        yield event(error_body(str(error), "server_error"))
    except Exception:  # the answer has begun: an event is the only way to say it
        yield event(error_body("internal error.", "server_error"))
    yield "data: [DONE]\n\n"


def event(content: dict[str, Any], name: str | None = None) -> str:
    """One event; names are for the responses API."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(content)}\n\n"
