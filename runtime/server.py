"""An OpenAI-compatible endpoint over one `Generator`, which runs several requests at a time."""

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import anyio
from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from qexport.errors import InputError, QexportError
from qexport.runtime import protocol
from qexport.runtime.engine import Engine
from qexport.runtime.generator import Generator, Piece
from qexport.runtime.protocol import ChatRequest, CompletionRequest, Reply, error_body, usage
from qexport.runtime.sampler import Sampling
from qexport.runtime.scheduler import QueueFullError
from qexport.version import __version__

__all__ = ["create_app"]

_TICK = 1.0  # seconds after which a waiting request looks whether its client is still there


def create_app(generator: Generator, model: str, api_key: str | None = None) -> FastAPI:
    """The application that serves `generator` under the name `model`.

    With an `api_key`, every route but /health wants it as a bearer token.
    """
    app = FastAPI(title="qexport", version=__version__, docs_url=None, redoc_url=None)
    engine = _Engine(generator, model)
    _install_errors(app)
    if api_key is not None:
        app.add_middleware(_Guard, api_key=api_key)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": model, "object": "model", "created": 0, "owned_by": "qexport"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        engine.check_model(body.model)
        reply = Reply("text_completion", model)
        prompt = body.prompt
        ids = (
            await to_thread.run_sync(generator.encode, prompt)
            if isinstance(prompt, str)
            else prompt
        )
        return await engine.answer(request, body, body.max_tokens, ids, reply)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        engine.check_model(body.model)
        reply = Reply("chat.completion", model)
        messages = [message.for_template() for message in body.messages]
        ids = await to_thread.run_sync(generator.encode_chat, messages)
        limit = body.max_completion_tokens or body.max_tokens
        return await engine.answer(request, body, limit, ids, reply)

    return app


class _NoSuchModelError(Exception):
    """A request names a model that is not served."""


class _Stream(StreamingResponse):
    """A stream that is closed with its connection, wherever the client's leaving caught it."""

    def __init__(self, events: AsyncGenerator[str, None], pieces: "_Pieces") -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events, self._pieces = events, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()
                await self._pieces.aclose()  # also where no event was ever asked for


class _Engine:
    """Follows generations from the event loop."""

    def __init__(self, generator: Generator, model: str) -> None:
        self._generator = generator
        self._model = model

    def check_model(self, name: str) -> None:
        """Raise _NoSuchModelError before any work is done for a model that is not served."""
        if name != self._model:
            shown = name[:100]
            raise _NoSuchModelError(f"the model {shown!r} is not served here; {self._model!r} is.")

    async def answer(
        self,
        request: Request,
        body: protocol.Request,
        limit: int | None,
        prompt: list[int],
        reply: Reply,
    ) -> Response:
        room = self._generator.context - len(prompt)
        sampling = body.sampling(limit or max(1, min(reply.default_tokens, room)))
        # Checked here, before a stream's 200 is on the wire.
        pieces = _Pieces(self._generator.engine, prompt, sampling)
        if body.stream:
            options = body.stream_options
            events = _events(pieces, reply, len(prompt), bool(options and options.include_usage))
            return _Stream(events, pieces)
        text, count, finish = "", 0, None
        async with aclosing(pieces):
            async for piece in pieces:
                if await request.is_disconnected():
                    return Response(status_code=499)
                if piece is not None:
                    text += piece.text
                    count, finish = piece.tokens, piece.finish_reason
        return JSONResponse(reply.whole(text, finish, usage(len(prompt), count)))


class _Pieces(AsyncIterator[Piece | None]):
    """One request's pieces, and None for every second without one. `aclose` gives the slot back.

    Pieces come from the engine's thread into the event loop's own queue, so that any number of
    requests may wait without a thread. Beginning one raises what `Engine.start` does.
    """

    def __init__(self, engine: Engine, prompt: list[int], sampling: Sampling) -> None:
        loop = asyncio.get_running_loop()
        self._made = asyncio.Queue[Piece]()
        self._ended = False

        def emit(piece: Piece) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(self._made.put_nowait, piece)

        self._engine = engine
        self._sequence = engine.start(prompt, sampling, emit)

    async def __anext__(self) -> Piece | None:
        if self._ended:
            raise StopAsyncIteration
        with anyio.move_on_after(_TICK):
            piece = await self._made.get()
            self._ended = piece.last
            if piece.error is not None:
                raise piece.error
            return piece
        return None

    async def aclose(self) -> None:
        """Stop the work, if it is not done."""
        if not self._ended:
            self._ended = True
            self._engine.cancel(self._sequence)


async def _events(
    pieces: _Pieces, reply: Reply, prompt: int, with_usage: bool
) -> AsyncGenerator[str, None]:
    """The server-sent events of one stream. An error after the first byte becomes an event."""
    count = 0
    try:
        async with aclosing(pieces):
            opening = reply.opening()
            if opening is not None:
                yield _event(opening)
            async for piece in pieces:
                if piece is None:
                    continue
                count = piece.tokens
                if piece.text:
                    yield _event(reply.chunk(piece.text, None))
                if piece.finish_reason is not None:
                    yield _event(reply.chunk("", piece.finish_reason))
        if with_usage:
            yield _event(reply.closing(usage(prompt, count)))
    except QexportError as error:
        yield _event(error_body(str(error), "server_error"))
    except Exception:  # the answer has begun: an event is the only way to say it
        yield _event(error_body("internal error.", "server_error"))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class _Guard:
    """Plain ASGI, so that nothing stands between a stream and its connection."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                content = error_body("a valid API key is needed.", code="invalid_api_key")
                answer = JSONResponse(content, 401, {"WWW-Authenticate": "Bearer"})
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _install_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        param = where[0] if where else None
        message = f"{'.'.join(where)}: {first['msg']}" if where else str(first["msg"])
        return JSONResponse(error_body(message, param=param), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:100]}: {error.detail}."
        return JSONResponse(error_body(message), error.status_code, error.headers)

    @app.exception_handler(_NoSuchModelError)
    async def no_model(_: Request, error: _NoSuchModelError) -> JSONResponse:
        return JSONResponse(error_body(str(error), param="model", code="model_not_found"), 404)

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> JSONResponse:
        content = error_body(str(error), "rate_limit_error", code="rate_limit_exceeded")
        return JSONResponse(content, 429, {"Retry-After": "1"})

    @app.exception_handler(QexportError)
    async def ours(_: Request, error: QexportError) -> JSONResponse:
        if isinstance(error, InputError):
            return JSONResponse(error_body(str(error)), 400)
        return JSONResponse(error_body(str(error), "server_error"), 500)

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body("internal error.", "server_error"), 500)
