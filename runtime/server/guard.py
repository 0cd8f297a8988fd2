"""What stands before the routes: hosts, keys, sizes and time. Plain ASGI, nothing between a stream
and its connection."""

import base64
import binascii
import hmac
from collections.abc import Iterable

import anyio
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qexport.runtime.server.errors import error_body
from qexport.runtime.server.limits import Limits

__all__ = ["Guard"]

_OPEN = ("/health",)
_CLOSE = {"Connection": "close"}
_BROWSERS = ("none", "same-origin")  # Sec-Fetch-Site of what a user opened, and of its own page


class Guard:
    """Refuses what a request must not be before anything is made of it.

    keys   one of which every route but /health wants: as a bearer token, as X-Api-Key, or as the
           password that a browser asks for; () for none
    hosts  names that requests may be for; None for any. Without a key this keeps pages of other
           sites, whose names were bound to this address, from asking (DNS rebinding)
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, keys: Iterable[str], hosts: Iterable[str] | None
    ) -> None:
        self._app, self._limits = app, limits
        self._keys = [key.encode() for key in keys]
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, self._receiving(receive), send)

    def _receiving(self, receive: Receive) -> Receive:
        """Bodies are counted, and waited for only so long."""
        size, whole = 0, False
        end = anyio.current_time() + self._limits.receive_seconds

        async def receiving() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()  # waits for the client to leave
            try:
                with anyio.fail_after(max(0.0, end - anyio.current_time())):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, "the body took too long to come", _CLOSE) from error
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if size > self._limits.body:
                    raise HTTPException(413, self._too_large(), _CLOSE)
            return message

        return receiving

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = scope["headers"]
        found = {bytes(name).lower(): bytes(value) for name, value in headers}
        if len(headers) > self._limits.headers:
            return _refuse(431, f"a request has at most {self._limits.headers} headers.")
        if self._hosts is not None:
            host = found.get(b"host", b"").decode("latin-1").lower()
            if _name(host) not in self._hosts:
                return _refuse(421, "this server is not served under that name.", "wrong_host")
        if self._keys and scope["path"] not in _OPEN and not self._has_key(found):
            body = error_body("a valid API key is needed.", "authentication_error")
            body["error"]["code"] = "invalid_api_key"
            # a browser that opens the page asks its user
            kind = "Basic realm=qexport" if scope["path"] == "/" else "Bearer"
            return JSONResponse(body, 401, {"WWW-Authenticate": kind})
        length = found.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.body:
            return _refuse(413, f"{self._too_large()}.")
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        found = [headers.get(b"x-api-key", b"")]
        scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            found.append(value.strip())
        elif scheme.lower() == b"basic":
            if _from_another_site(headers):  # browsers add it to what those make them send, too
                return False
            try:
                found.append(base64.b64decode(value, validate=True).partition(b":")[2])
            except binascii.Error:
                return False
        # all are compared: the time says nothing about which one nearly fit
        return sum(hmac.compare_digest(one, key) for key in self._keys for one in found) > 0

    def _too_large(self) -> str:
        return f"a body has at most {self._limits.body} bytes"


def _from_another_site(headers: dict[bytes, bytes]) -> bool:
    """Whether a browser sends this for a page that is not ours.

    Over plain HTTP, except to localhost, it says so by Origin alone.
    """
    if headers.get(b"sec-fetch-site", b"none").decode("latin-1") not in _BROWSERS:
        return True
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host", b"")


def _name(host: str) -> str:
    """The name of a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _refuse(status: int, message: str, code: str | None = None) -> JSONResponse:
    headers = _CLOSE if status in (408, 413, 431) else None
    return JSONResponse(error_body(message, code=code), status, headers)
