"""Clients that do not behave, on raw sockets: slow, half-open, garbage, oversized, gone."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qexport.cli.serve import _listen
from tests.runtime.server.conftest import Server

LIMITS = ("--limit", "receive_seconds=1", "--limit", "idle_seconds=1", "--limit", "send_seconds=1")


@pytest.fixture(scope="module")
def strict(endless: Path) -> Iterator[Server]:
    """A server of two slots that waits for nobody for long."""
    bounds = ("--limit", "body=10000", "--limit", "headers=20")
    running = Server(endless, "--slots", "2", *LIMITS, *bounds)
    yield running
    running.stop()
    assert "Traceback" not in running.log, running.log


def connect(server: Server, seconds: float = 20) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=seconds)


def request(path: str, body: Any = None, *headers: str) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def answers(server: Server) -> None:
    """The server takes requests, and its slots are free."""
    body = {"model": server.model, "prompt": "x", "max_tokens": 2}
    for _ in range(4):
        assert server.post("/v1/completions", body).status_code == 200


def idle(server: Server, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while server.status()["running"]:
        assert time.monotonic() < end, "a slot is still taken"
        time.sleep(0.02)


LONG = {"prompt": "ab", "max_tokens": 100_000, "stream": True, "seed": 1}


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: local",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
    ids=["nothing", "half a head", "half a body", "half a chunk"],
)
def test_half_open_connections_are_closed(strict: Server, sent: bytes) -> None:
    with connect(strict) as connection:
        connection.sendall(sent)
        begin = time.monotonic()
        everything(connection)
        assert time.monotonic() - begin < 10
    answers(strict)


def test_a_body_that_drips_is_not_waited_for(strict: Server) -> None:
    """A byte a second keeps nothing open."""
    with connect(strict) as connection:
        connection.sendall(request("/v1/completions", {"x": 1}).replace(b": 8\r", b": 900\r")[:-3])
        begin = time.monotonic()
        with pytest.raises(OSError):  # reset or broken pipe, whichever comes first
            while time.monotonic() - begin < 60:
                connection.sendall(b" ")
                time.sleep(0.4)
        assert time.monotonic() - begin < 45


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET\r\n\r\n",
        b"\x00" * 1000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"A: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
    ids=["tls", "no path", "zeros", "version", "length", "smuggling", "long header"],
)
def test_garbage_gets_an_error_and_an_end(strict: Server, garbage: bytes) -> None:
    with connect(strict) as connection:
        try:
            connection.sendall(garbage)
            found = everything(connection)
        except ConnectionError:  # closed with bytes of ours unread
            found = b""
    assert not found or found.startswith(b"HTTP/1.1 4"), found[:100]
    assert not found or json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"]
    answers(strict)


def test_too_many_headers(strict: Server) -> None:
    with connect(strict) as connection:
        connection.sendall(request("/health", None, *(f"X-{i}: 1" for i in range(40))))
        found = everything(connection)
    assert found.startswith(b"HTTP/1.1 431")
    assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_bodies_that_are_too_large(strict: Server) -> None:
    """By what is announced, and by what comes in chunks."""
    big = {"model": strict.model, "prompt": "x" * 20_000}
    assert strict.post("/v1/completions", big).status_code == 413
    head = request("/v1/completions", {}).replace(
        b"Content-Length: 2", b"Transfer-Encoding: chunked"
    )[:-2]
    with connect(strict) as connection:
        connection.sendall(head + b"4e20\r\n" + b" " * 20_000 + b"\r\n0\r\n\r\n")
        found = connection.recv(65536)
    assert found.startswith(b"HTTP/1.1 413"), found
    answers(strict)


def test_pipelined_requests_are_answered_in_order(strict: Server) -> None:
    with connect(strict) as connection:
        asked = (
            request("/version")
            + request("/health")
            + request("/v1/models", None, "Connection: close")
        )
        connection.sendall(asked)
        found = everything(connection)
    places = [found.find(word) for word in (b'"version"', b'"status"', b'"object"')]
    assert -1 not in places and places == sorted(places)
    assert found.count(b"HTTP/1.1 200") == 3


def test_a_slow_reader_is_left(strict: Server) -> None:
    """It takes nothing: its connection is closed, and its slot given back."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", strict.port))
        connection.sendall(request("/v1/completions", {**LONG, "model": strict.model}))
        connection.recv(10)
        idle(strict, 60)
        # the connection too has ended, though it was never read: what is left in it comes, and then
        # its end
        connection.settimeout(20)
        try:
            while connection.recv(1 << 20):
                pass
        except ConnectionResetError:
            pass  # an end as well
    answers(strict)


def test_what_nobody_reads_does_not_pile_up(endless: Path) -> None:
    """A reader so slow that its connection lives on has its answer ended, with an error."""
    server = Server(endless, "--slots", "1", "--limit", "send_seconds=600")
    try:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(request("/v1/completions", {**LONG, "model": server.model}))
            connection.recv(10)
            idle(server, 300)
            connection.settimeout(20)
            found = connection.recv(1 << 16)
            while b"[DONE]" not in found[-100:]:
                found = found[-1000:] + connection.recv(1 << 16)
        assert b"reads too slowly" in found
    finally:
        server.stop()


def test_a_second_request_of_a_connection_has_its_own_time(strict: Server) -> None:
    """The clock that ran for the first one's head does not end the second one's answer."""
    body = {**LONG, "model": strict.model, "stream": False, "max_tokens": 4000}
    with connect(strict) as connection:
        for _ in range(3):
            time.sleep(0.7)
            connection.sendall(request("/v1/completions", body))
            found = b""
            while b"finish_reason" not in found:
                part = connection.recv(65536)
                assert part, "the connection was closed"
                found += part
            while not found.rstrip().endswith(b"}"):
                found += connection.recv(65536)
            assert found.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize"])
def test_a_client_that_goes_before_its_answer_begins(strict: Server, path: str) -> None:
    """While its text is rendered and tokenized: nothing is begun for it, nothing is left."""
    text = "word " * 1500
    body: dict[str, Any] = {"model": strict.model, "messages": [{"role": "user", "content": text}]}
    if path == "/v1/responses":
        body = {"model": strict.model, "input": text}
    for _ in range(20):
        with connect(strict) as connection:
            connection.sendall(request(path, body))
    idle(strict)
    answers(strict)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("wait", [0.0, 0.01, 0.1, 0.5])
def test_a_client_that_goes_frees_its_slot(strict: Server, wait: float, stream: bool) -> None:
    body = {**LONG, "model": strict.model, "stream": stream}
    for how in ("close", "reset", "half"):
        connection = connect(strict)
        connection.sendall(request("/v1/completions", body))
        time.sleep(wait)
        if how == "reset":
            linger = (1).to_bytes(4, "little") + bytes(4)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if how == "half":
            connection.shutdown(socket.SHUT_WR)
        if how != "half":
            connection.close()
        idle(strict)
        connection.close()
    answers(strict)


def test_answers_are_not_held_back() -> None:
    """Pieces are sent at once: none waits 40 ms for the client to acknowledge the one before."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def take(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            found.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = _listen("127.0.0.1", 0)
        async with await asyncio.start_server(take, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await asyncio.wait_for(found, 10)

    assert asyncio.run(accepted()) != 0
