"""The routes of an OpenAI-compatible server over one model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware

from qexport.runtime.generator import Generator
from qexport.runtime.server.errors import FieldError, error_body, install_errors
from qexport.runtime.server.guard import Guard
from qexport.runtime.server.limits import Limits
from qexport.runtime.server.observe import Record, RequestLog
from qexport.runtime.server.replies import Reply
from qexport.runtime.server.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from qexport.runtime.server.responses import Response as ResponseObject
from qexport.runtime.server.service import Exchange, Service
from qexport.runtime.server.streams import EventStream, openai_events
from qexport.version import __version__

__all__ = ["create_app"]

_PAGE = Path(__file__).parent / "page"
_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_CHAT_TOKENS, _COMPLETION_TOKENS = 512, 16  # where a request names no limit

_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": about, "content": _ERROR}
    for status, about in {
        400: "A field is wrong or unknown.",
        401: "No valid API key.",
        404: "No such model.",
        408: "The request took too long to come.",
        413: "The body is too large.",
        421: "Not served under this name.",
        429: "Too many requests wait.",
        431: "Too many headers.",
        500: "The model failed.",
        503: "The server is ending, or its engine has.",
    }.items()
}
_STREAMED: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    200: {
        "description": "The answer.",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
}


def create_app(
    generator: Generator,
    model: str,
    *,
    limits: Limits | None = None,
    keys: Iterable[str] = (),
    hosts: Iterable[str] | None = None,
    origins: Iterable[str] = (),
    log: RequestLog | None = None,
) -> FastAPI:
    """The application that serves `generator` under the name `model`.

    keys, hosts   see `Guard`
    origins       of pages that browsers may let ask (CORS); () for none
    `app.state.service` is the `Service` behind it.
    """
    app = FastAPI(title="qexport", version=__version__, docs_url=None, redoc_url=None)
    limits = limits or Limits()
    service = Service(generator, model, limits, log)
    app.state.service = service
    install_errors(app)
    app.add_middleware(Guard, limits=limits, keys=list(keys), hosts=hosts)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    _add_state(app, service)
    _add_tokens(app, service)
    _add_completions(app, service)
    _add_chat(app, service)
    _add_responses(app, service)
    _add_page(app, service)
    _document_errors(app)
    return app


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={503: _ERRORS[503]})
    async def health() -> Response:
        trouble = service.trouble
        if trouble is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse(error_body(trouble, "server_error"), 503)

    @app.get("/ready", responses=_ERRORS)
    async def ready() -> Response:
        trouble = "the server is shutting down." if service.draining else service.trouble
        if trouble is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse(error_body(trouble, "server_error"), 503)

    @app.get("/metrics", responses=_ERRORS, response_class=PlainTextResponse)
    async def metrics() -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(service.metrics.text(), media_type=kind)

    @app.get("/version", responses=_ERRORS)
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/status", responses=_ERRORS)
    async def status() -> dict[str, Any]:
        engine = service.generator.engine
        decoder = service.generator.decoder
        return {
            **{"model": service.model, "version": __version__, "kernels": decoder.kernels},
            **{"slots": decoder.slots, "context": service.generator.context},
            **{"running": engine.running, "waiting": engine.waiting},
            **{"draining": service.draining, "chat": service.generator.has_template},
        }

    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {
        **{"id": service.model, "object": "model", "created": 0, "owned_by": "qexport"},
        "max_model_len": service.generator.context,
    }


def _add_tokens(app: FastAPI, service: Service) -> None:
    generator = service.generator

    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        if body.messages is not None:
            chat = ChatRequest(model=service.model, messages=body.messages)
            ids = await service.encode_chat(chat)
        else:
            assert body.prompt is not None
            text, special = body.prompt, body.add_special_tokens
            ids = await to_thread.run_sync(lambda: generator.encode(text, special))
        found = {"count": len(ids), "max_model_len": generator.context, "tokens": ids}
        if body.return_token_strs:
            found["token_strs"] = generator.tokenizer.convert_ids_to_tokens(ids)
        return found

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        service.check_model(body.model)
        return {"prompt": await to_thread.run_sync(generator.decode, body.tokens)}


def _record(service: Service, route: str, body: Any, prompt: Any) -> Record:
    record = Record(service.metrics, service.log, route, bool(body.stream))
    record.prompt(prompt)
    return record


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_STREAMED, response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        record = _record(service, "/v1/completions", body, body.prompt)
        await service.prepare(body.logprobs is not None)
        if not body.prompts:
            raise FieldError("prompt: there is none.", "prompt")
        service.check_choices(len(body.prompts), body)
        prompts = [await service.encode(prompt) for prompt in body.prompts]
        jobs = service.jobs(body, prompts, _COMPLETION_TOKENS)
        echoes = None
        if body.echo:
            echoes = [service.generator.decode(job.prompt) for job in jobs]
        exchange = Exchange.begin(service, jobs, record, set())
        reply = Reply("text_completion", service.model, service.spell, body.logprobs is not None)
        record.about(id=reply.id)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(openai_events(exchange, reply, usage, echoes), exchange.answers)

        def make() -> dict[str, Any]:
            for choice, echo in zip(exchange.choices, echoes or (), strict=False):
                choice.text = echo + choice.text
            return reply.whole(exchange.choices, exchange.counts)

        return await exchange.whole(request, make)


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses=_STREAMED, response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        record = _record(service, "/v1/chat/completions", body, messages)
        exchange = await _begin_chat(service, body, record)
        logprobs = bool(body.logprobs)
        reply = Reply("chat.completion", service.model, service.spell, logprobs)
        record.about(id=reply.id)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(openai_events(exchange, reply, usage), exchange.answers)
        return await exchange.whole(request, lambda: reply.whole(exchange.choices, exchange.counts))


async def _begin_chat(service: Service, body: ChatRequest, record: Record) -> Exchange:
    await service.prepare(bool(body.logprobs))
    grammar = await service.grammar(body)
    prompt = await service.encode_chat(body)
    tools = {tool.function.name for tool in body.tools or ()}
    if body.tool_choice == "none":
        tools = set()
    jobs = service.jobs(body, [prompt], _CHAT_TOKENS, grammar)
    return Exchange.begin(service, jobs, record, tools)


def _add_responses(app: FastAPI, service: Service) -> None:
    @app.post("/v1/responses", responses=_STREAMED, response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        service.check_model(body.model)
        record = _record(service, "/v1/responses", body, body.model_dump()["input"])
        exchange = await _begin_chat(service, body.as_chat(), record)
        response = ResponseObject(body, exchange)
        if body.stream:
            return EventStream(response.events(), exchange.answers)
        return await exchange.whole(request, response.whole)


def _add_page(app: FastAPI, service: Service) -> None:
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
    for path, name in (("/", "index.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):

        def page(name: str = name) -> FileResponse:
            return FileResponse(_PAGE / name, headers={**headers, "Cache-Control": "no-cache"})

        app.add_api_route(path, page, include_in_schema=False, response_model=None)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)


def _document_errors(app: FastAPI) -> None:
    """The form of errors in /openapi.json, instead of FastAPI's own."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        schema = made()
        fields = {"message": {"type": "string"}, "type": {"type": "string"}}
        for name in ("param", "code"):
            fields[name] = {"type": ["string", "null"]}  # type: ignore[dict-item]
        error = {"type": "object", "required": list(fields), "properties": fields}
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        components["Error"] = {
            **{"type": "object", "required": ["error"]},
            "properties": {"error": error},
        }
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
