"""Errors in OpenAI's form, on every route."""

import http
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from qexport.errors import InputError, QexportError
from qexport.runtime.scheduler import ContextError, QueueFullError

__all__ = [
    "FieldError",
    "NoSuchModelError",
    "UnavailableError",
    "answer_of",
    "error_body",
    "install_errors",
]

_LONGEST_MESSAGE = 500  # a request must not choose the size of its answer
_LONGEST_NAME = 100


class FieldError(InputError):
    """A field of a request that is wrong; `param` is its name."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class NoSuchModelError(QexportError):
    """A request names a model that is not served."""


class UnavailableError(QexportError):
    """The server is ending, or its engine has."""


def error_body(
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """An error in OpenAI's form; `kind` is its `type`."""
    message = message[:_LONGEST_MESSAGE].encode(errors="replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install_errors(app: FastAPI) -> None:
    """Answer every exception in that form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = _nearest(error.errors())
        where = _path(first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this field is unknown, or not served here"
        if not where and first["type"] in ("missing", "model_attributes_type"):
            message = "the body is no JSON object"
            if "json" not in request.headers.get("content-type", ""):
                message = "the body is not read as JSON; send content-type: application/json"
        if first["type"] == "json_invalid":
            where, message = [], f"the body is not JSON ({first['ctx']['error']})"
        text = f"{'.'.join(where)}: {message}." if where else f"{message}."
        return JSONResponse(error_body(text, param=where[0] if where else None), 400)

    @app.exception_handler(HTTPException)
    async def by_status(request: Request, error: HTTPException) -> JSONResponse:
        status = http.HTTPStatus(error.status_code)
        path = request.url.path[:_LONGEST_NAME]
        text = f"{request.method} {path}: {error.detail or status.phrase}."
        return JSONResponse(error_body(text), status, error.headers)

    @app.exception_handler(QexportError)
    async def ours(_: Request, error: QexportError) -> JSONResponse:
        return answer_of(error)

    @app.exception_handler(ValidationError)
    async def inner(_: Request, error: ValidationError) -> JSONResponse:
        first = _nearest(error.errors())
        where = _path(first["loc"])
        text = f"{'.'.join(where)}: {first['msg']}."
        return JSONResponse(error_body(text, param=where[0] if where else None), 400)

    @app.exception_handler(UnicodeEncodeError)
    async def no_text(_: Request, __: UnicodeEncodeError) -> JSONResponse:
        return JSONResponse(error_body("a text is not valid Unicode (half a character)."), 400)

    @app.exception_handler(RecursionError)
    async def too_deep(_: Request, __: RecursionError) -> JSONResponse:
        return JSONResponse(error_body("the body is nested too deeply."), 400)

    @app.exception_handler(Exception)
    async def bug(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse(error_body("internal error.", "server_error"), 500)


def answer_of(error: QexportError) -> JSONResponse:
    """The status and body of one of our errors."""
    text = str(error)
    if isinstance(error, NoSuchModelError):
        return JSONResponse(error_body(text, param="model", code="model_not_found"), 404)
    if isinstance(error, QueueFullError):
        body = error_body(text, "rate_limit_error", code="rate_limit_exceeded")
        return JSONResponse(body, 429, {"Retry-After": "1"})
    if isinstance(error, UnavailableError):
        body = error_body(text, "server_error", code="unavailable")
        return JSONResponse(body, 503, {"Retry-After": "5"})
    if isinstance(error, InputError):
        param = error.param if isinstance(error, FieldError) else None
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        return JSONResponse(error_body(text, param=param, code=code), 400)
    return JSONResponse(error_body(text, "server_error"), 500)


def _nearest(errors: Sequence[Any]) -> Any:
    """The first error, or one of what it is about that says more exactly where: of a content that
    is a list of parts pydantic tells first that it is no text."""
    place = _path(errors[0]["loc"])
    about = [error for error in errors if _path(error["loc"])[: len(place)] == place]
    return max(about, key=lambda error: len(_path(error["loc"])))


def _path(location: tuple[Any, ...]) -> list[str]:
    """Names and indices of a validation error's place, without pydantic's names of union types."""
    parts = [part for part in location if part != "body"]
    plain = [str(part) for part in parts if isinstance(part, int) or str(part).isidentifier()]
    types = {"str", "int", "float", "bool", "none", "dict", "list"}
    types |= {"text", "tokens", "texts", "many"} if parts[:1] == ["prompt"] else set()
    return [part[:_LONGEST_NAME] for part in plain if part not in types]
