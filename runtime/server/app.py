"""The routes of an OpenAI-compatible server over one model."""

import uuid
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware

from qexport.runtime.generator import Generator
from qexport.runtime.server.errors import FieldError, error_body, install_errors
from qexport.runtime.server.guard import Guard
from qexport.runtime.server.limits import Limits
from qexport.runtime.server.record import Record, Recorder
from qexport.runtime.server.replies import Reply
from qexport.runtime.server.request_log import RequestLog
from qexport.runtime.server.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from qexport.runtime.server.responses import Response as ResponseObject
from qexport.runtime.server.responses import ResponsesRequest
from qexport.runtime.server.service import Exchange, Service
from qexport.runtime.server.streams import OpenAIAnswer, respond
from qexport.runtime.server.tools import offered
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
    limits, keys = limits or Limits(), list(keys)
    service = Service(generator, model, limits, log)
    app.state.service = service
    install_errors(app)
    app.add_middleware(Guard, limits=limits, keys=keys, hosts=hosts)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Recorder, metrics=service.metrics, log=log)
    _add_state(app, service)
    _add_tokens(app, service)
    _add_completions(app, service)
    _add_chat(app, service)
    _add_responses(app, service)
    _add_page(app)
    _document(app, locked=bool(keys))
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
    async def tokenize(body: TokenizeRequest) -> JSONResponse:
        service.check_model(body.model)
        if body.messages is not None:
            chat = ChatRequest(model=service.model, messages=body.messages)
            ids = await service.encode_chat(chat)
        else:
            ids = await service.encode(body.prompt or "", body.add_special_tokens)

        def made() -> JSONResponse:
            found = {"count": len(ids), "max_model_len": generator.context, "tokens": ids}
            if body.return_token_strs:
                found["token_strs"] = generator.tokenizer.convert_ids_to_tokens(ids)
            return JSONResponse(found)

        return await service.text_lane.run(made)

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> JSONResponse:
        service.check_model(body.model)

        def made() -> JSONResponse:
            return JSONResponse({"prompt": generator.decode(body.tokens)})

        return await service.text_lane.run(made)


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_STREAMED, response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        record: Record = request.state.record
        record.asked(bool(body.stream), lambda: body.prompt)

        async def begin() -> OpenAIAnswer:
            service.admit()
            if not body.prompts:
                raise FieldError("prompt: there is none.", "prompt")
            service.check_choices(len(body.prompts), body)
            if body.logprobs is not None:
                await service.prepare_spelling()
            prompts = [
                await service.encode(prompt) if isinstance(prompt, str) else prompt
                for prompt in body.prompts
            ]
            echoes = await _echoes(service, body) if body.echo else None
            jobs = service.jobs(body, prompts, _COMPLETION_TOKENS)
            reply = Reply(
                "text_completion", service.model, service.spell, body.logprobs is not None
            )
            exchange = Exchange(service, jobs, record, reply.id)
            return OpenAIAnswer(exchange, reply, body.usage_wanted, echoes)

        return await respond(request, bool(body.stream), begin)


async def _echoes(service: Service, body: CompletionRequest) -> list[str]:
    """The prompt of each choice, as it was given."""
    found = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            text = prompt
        else:
            text = await service.text_lane.run(partial(service.generator.decode, prompt))
        found += [text] * body.choices
    return found


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses=_STREAMED, response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        record: Record = request.state.record
        record.asked(bool(body.stream), lambda: [m.for_template() for m in body.messages])

        async def begin() -> OpenAIAnswer:
            reply = Reply("chat.completion", service.model, service.spell, bool(body.logprobs))
            exchange = await _begin_chat(service, body, record, reply.id)
            return OpenAIAnswer(exchange, reply, body.usage_wanted)

        return await respond(request, bool(body.stream), begin)


async def _begin_chat(service: Service, body: ChatRequest, record: Record, answer: str) -> Exchange:
    service.admit()
    service.check_choices(1, body)
    if body.logprobs:
        await service.prepare_spelling()
    grammar = await service.grammar(body)
    prompt = await service.encode_chat(body)
    jobs = service.jobs(body, [prompt], _CHAT_TOKENS, grammar)
    tools = {tool.function.name for tool in offered(body)}
    return Exchange(service, jobs, record, answer, tools, body.parallel_tool_calls is not False)


def _add_responses(app: FastAPI, service: Service) -> None:
    @app.post("/v1/responses", responses=_STREAMED, response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        service.check_model(body.model)
        record: Record = request.state.record
        record.asked(bool(body.stream), lambda: body.model_dump()["input"])

        async def begin() -> ResponseObject:
            answer = f"resp_{uuid.uuid4().hex}"
            exchange = await _begin_chat(service, body.as_chat(), record, answer)
            return ResponseObject(body, exchange, answer)

        return await respond(request, bool(body.stream), begin)


def _add_page(app: FastAPI) -> None:
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    for path, name, kind in (
        ("/", "index.html", "text/html"),
        ("/page.css", "page.css", "text/css"),
        ("/page.js", "page.js", "text/javascript"),
    ):
        content = (_PAGE / name).read_bytes()

        async def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind, headers=headers)

        app.add_api_route(path, page, include_in_schema=False, response_model=None)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)


def _document(app: FastAPI, locked: bool) -> None:
    """The form of errors in /openapi.json, instead of FastAPI's own, and the key."""
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
        if locked:
            bearer = {"type": "http", "scheme": "bearer"}
            schema["components"]["securitySchemes"] = {"key": bearer}
            schema["security"] = [{"key": []}]
            schema["paths"]["/health"]["get"]["security"] = []
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
