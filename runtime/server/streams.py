"""Answers on their way to the client: whole, or as server-sent events; and clients that leave."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

import anyio
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qexport.errors import QexportError
from qexport.runtime.server.answers import Answers
from qexport.runtime.server.errors import error_body
from qexport.runtime.server.record import CLIENT_LEFT
from qexport.runtime.server.replies import Reply
from qexport.runtime.server.service import Exchange

__all__ = ["Answer", "OpenAIAnswer", "event", "respond"]

Result = TypeVar("Result")


class Answer(Protocol):
    """The form of an answer in one of OpenAI's APIs."""

    exchange: Exchange

    async def whole(self) -> dict[str, Any]:
        """The body, once all of the exchange is there."""

    def events(self) -> AsyncGenerator[str, None]:
        """The same as events, while it is made."""


class OpenAIAnswer:
    """Of chats and completions. `echoes` are prompts that their choices begin with."""

    def __init__(
        self, exchange: Exchange, reply: Reply, with_usage: bool, echoes: list[str] | None = None
    ) -> None:
        self.exchange, self._reply = exchange, reply
        self._with_usage, self._echoes = with_usage, echoes

    async def whole(self) -> dict[str, Any]:
        choices = self.exchange.choices
        for choice, echo in zip(choices, self._echoes or (), strict=False):
            choice.text = echo + choice.text
        make = partial(self._reply.whole, choices, self.exchange.counts)
        if any(choice.logprobs for choice in choices):  # they are many times the text
            return await asyncio.to_thread(make)
        return make()

    async def events(self) -> AsyncGenerator[str, None]:
        """Chunks. An error after the first byte becomes an event."""
        extra = {"usage": None} if self._with_usage else {}
        reply = self._reply
        try:
            for index in range(len(self.exchange.choices)):
                opening = reply.opening(index)
                if opening is not None:
                    yield event({**opening, **extra})
                if self._echoes is not None:
                    yield event({**reply.echo(index, self._echoes[index]), **extra})
            async with aclosing(self.exchange.deltas()) as deltas:
                async for index, delta in deltas:
                    for chunk in reply.chunks(index, delta):
                        yield event({**chunk, **extra})
            if self._with_usage:
                yield event(reply.closing(self.exchange.counts))
        except QexportError as error:
            yield event(error_body(str(error), "server_error"))
        except Exception:  # the answer has begun: an event is the only way to say it
            yield event(error_body("internal error.", "server_error"))
        yield "data: [DONE]\n\n"


async def respond(
    request: Request, stream: bool, begin: Callable[[], Awaitable[Answer]]
) -> Response:
    """What `begin` makes, in either form; the work stops when the client leaves."""
    answer = await _while_connected(request, begin)
    if answer is None:
        return Response(status_code=CLIENT_LEFT)
    if stream:
        return _EventStream(answer.events(), answer.exchange.answers)

    async def work() -> Response:
        await answer.exchange.finish()
        return JSONResponse(await answer.whole())

    try:
        return await _while_connected(request, work) or Response(status_code=CLIENT_LEFT)
    finally:
        await answer.exchange.answers.aclose()  # also where `work` never began


class _EventStream(StreamingResponse):
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


def event(content: dict[str, Any], name: str | None = None) -> str:
    """One event; names are for the responses API."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(content)}\n\n"


async def _while_connected(
    request: Request, work: Callable[[], Awaitable[Result]]
) -> Result | None:
    """The result of `work`, or None if the client left before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work()), asyncio.ensure_future(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
