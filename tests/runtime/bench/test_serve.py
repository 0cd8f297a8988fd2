"""`qexport bench serve` against our own server."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qexport.errors import InputError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.runtime.bench.processes import listener
from qexport.runtime.bench.serve import SCHEMA, parse_goodput
from tests.conftest import Cli, Runs
from tests.runtime.server.conftest import Server


@pytest.fixture(scope="module")
def server(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    assert pack(open_checkpoint(runs("4")), FORMATS["native"], folder).exact
    served = Server(folder, "--api-key", "k", "--slots", "4", "--limit", "queue=4")
    yield served
    served.stop()


def bench(cli: Cli, server: Server, *arguments: object) -> dict[str, Any]:
    common = ("--url", server.root, "--api-key", "k", "--words", "5", "--tokens", "8", "--json")
    result = cli("bench", "serve", *common, *arguments)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_closed_loop(cli: Cli, server: Server, tmp_path: Path) -> None:
    """So many clients, every answer whole and as long as asked for."""
    found = bench(cli, server, "--concurrency", "1,3", "--requests", "6", "-o", tmp_path / "out")
    assert found["schema"] == SCHEMA and found["settings"]["model"] == "tiny"
    assert [level["level"] for level in found["levels"]] == [1, 3]
    for level in found["levels"]:
        assert (level["whole"], level["failed"], level["tokens"]) == (6, 0, 48)
        assert level["tokens_per_second"] == pytest.approx(48 / level["seconds"])
        assert level["goodput_per_second"] is None
        assert level["ttft"]["p50"] <= level["e2e"]["p50"]
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") == 2


def test_an_open_loop_and_its_goodput(cli: Cli, server: Server) -> None:
    """Everything is within a minute, and nothing within a microsecond."""
    asked = ("--rate", "20", "--requests", "8")
    (level,) = bench(cli, server, *asked, "--goodput", "e2e:60000", "--goodput", "itl:60000")[
        "levels"
    ]
    assert level["good_share"] == 1.0
    assert level["goodput_per_second"] == pytest.approx(level["requests_per_second"])
    (level,) = bench(cli, server, *asked, "--goodput", "ttft:0.001")["levels"]
    assert level["good_share"] == 0.0 and level["whole"] == 8


def test_failures_are_counted_and_told(cli: Cli, server: Server) -> None:
    """More clients than may wait: 429s, an exit code, and the reason."""
    common = ("bench", "serve", "--url", server.root, "--api-key", "k", "--tokens", "64")
    result = cli(*common, "--concurrency", "40", "--requests", "40", "--words", "5", "--json")
    assert result.returncode == 1 and "requests failed" in result.stderr
    (level,) = json.loads(result.stdout)["levels"]
    assert level["failed"] > 0 and level["whole"] + level["failed"] == 40
    assert level["errors"][0].startswith("429: ")


EVENTS = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
TOKEN = 'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
END = 'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n'
DONE = "data: [DONE]\n\n"


MODEL = ("--model", "m")


def read_request(connection: socket.socket) -> None:
    """All of it: what is left unread when a socket is closed resets it."""
    with connection.makefile("rb") as file:
        length = 0
        while (line := file.readline()).strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        file.read(length)


def usage(tokens: object) -> str:
    body = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}}
    return f"data: {json.dumps(body)}\n\n"


def against(cli: Cli, answer: str, *arguments: object, pause: float = 0.0) -> dict[str, Any]:
    """Two requests of four tokens to a server that answers them so; and what is said of it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # the test has closed it
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=reply, args=(connection,), daemon=True).start()

    def reply(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the client has left
            read_request(connection)
            for part in answer.split("\n\n") if pause else (answer,):
                connection.sendall((part + "\n\n" * bool(pause)).encode())
                time.sleep(pause)

    threading.Thread(target=serve, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    asked = ("--url", url, "--concurrency", "1", "--requests", "2", "--tokens", "4", "--json")
    result = cli("bench", "serve", *asked, *([] if "--model" in arguments else MODEL), *arguments)
    listener.close()
    assert "Traceback" not in result.stderr, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    (level,) = found["levels"]
    assert result.returncode == (1 if level["failed"] else 0)
    assert "noisy" in result.stderr.lower()  # two requests tell nothing
    return {**level, "reasons": found["noise"]["reasons"]}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (EVENTS + TOKEN, "ended before its end"),
        (EVENTS + 'data: {"error": {"message": "a\u2028b"}}\n\n', "u2028"),
        (EVENTS + "data: [1]\n\n", "none of a completion: data: [1]"),
        (EVENTS + "data: null\n\n", "none of a completion"),
        (EVENTS + "data: 5\n\n" + DONE, "none of a completion"),
        (EVENTS + 'data: {"choices": null}\n\n' + DONE, "none of a completion"),
        (EVENTS + "data: {oops\n\n" + DONE, "none of a completion"),
        (EVENTS + TOKEN * 4 + usage(float("inf")) + DONE, "none of a completion"),
        (EVENTS + 'data: {"error": {"message": "out of\\nmemory"}}\n\n', "out of"),
        (EVENTS + END + DONE, "an answer without text"),
        (EVENTS + TOKEN * 4 + usage(400) + DONE, "usage says 400 tokens, of 4 asked for"),
        (EVENTS + TOKEN * 4 + usage(-4) + DONE, "usage says -4 tokens"),
        (EVENTS + TOKEN * 4 + usage(1) + DONE, "usage says 1 tokens, of 4 asked for and 4 events"),
        (EVENTS + TOKEN * 2 + usage(2) + DONE, "2 tokens of 4; --ends"),
        (
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n{}",
            "no events came, but application/json",
        ),
        ("HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\na\n\nb", "503: a b"),
        ("nonsense\r\n\r\n", "RemoteProtocolError"),
    ],
)
def test_answers_that_are_none(cli: Cli, answer: str, said: str) -> None:
    """They are failures, not fast answers; the reason is told in a line."""
    level = against(cli, answer)
    assert (level["whole"], level["failed"]) == (0, 2)
    assert said in level["errors"][0] and "\n" not in level["errors"][0]
    assert any("2 of 2 requests failed" in reason for reason in level["reasons"])


def test_what_counts_as_a_token(cli: Cli) -> None:
    """The server's number, or that of events; an end without text is none, a silence is."""
    level = against(cli, EVENTS + TOKEN * 4 + END + usage(4) + DONE)
    assert (level["whole"], level["tokens"]) == (2, 8)
    assert len(level["samples"][0]["times"]) == 4
    level = against(cli, EVENTS + TOKEN * 3 + DONE)  # without usage
    assert (level["whole"], level["tokens"]) == (2, 6)
    level = against(cli, EVENTS + TOKEN * 2 + usage(2) + DONE, "--ends")
    assert (level["whole"], level["tokens"]) == (2, 4)
    half = TOKEN.replace('"a"', '""')
    level = against(cli, EVENTS + (half + TOKEN) * 2 + usage(4) + DONE)
    assert len(level["samples"][0]["times"]) == 4


def test_a_timeout_is_of_the_whole_request(cli: Cli) -> None:
    """However often something comes."""
    level = against(cli, EVENTS + TOKEN * 100 + DONE, "--timeout", "0.5", pause=0.1)
    assert (level["whole"], level["failed"]) == (0, 2)
    assert level["errors"] == ["no whole answer within 0.5 seconds"]


def test_a_report_shows_names_as_they_are(cli: Cli, tmp_path: Path) -> None:
    """A server's words mean nothing to Markdown or HTML."""
    name = "<img src=x>|[a](b)`"
    error = EVENTS + 'data: {"error": "**<b>|x"}\n\n'
    against(cli, error, "--model", name, "-o", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "<img" not in text and "<b>" not in text
    assert "&lt;img src=x&gt;\\|\\[a\\](b)\\`" in text
    assert "<img" not in (tmp_path / "out" / "report.html").read_text()
    assert "False" in (tmp_path / "out" / "report.csv").read_text().splitlines()[1]


def test_mistakes_in_a_sentence(cli: Cli, server: Server) -> None:
    for code, said, *arguments in (
        (2, "either --concurrency or --rate"),
        (2, "either --concurrency or --rate", "--concurrency", "1", "--rate", "1"),
        (2, "does not begin with http", "--concurrency", "1", "--url", "localhost"),
        (2, "is none", "--concurrency", "1", "--url", "http://a:b:c"),
        (2, "and a host", "--concurrency", "1", "--url", "http://"),
        (2, "password", "--concurrency", "1", "--url", "http://me:secret@localhost"),
        (2, "a header cannot hold", "--concurrency", "1", "--api-key", "schlüssel"),
        (1, "does not list its models", "--concurrency", "1", "--url", "http://127.0.0.1:9"),
        (1, "401", "--concurrency", "1", "--url", server.root, "--api-key", "wrong"),
        (2, "a colon and milliseconds", "--rate", "1", "--goodput", "speed:1"),
    ):
        result = cli("bench", "serve", *arguments)
        assert result.returncode == code, result.stderr
        assert said in result.stderr and "Traceback" not in result.stderr
    with pytest.raises(InputError):
        parse_goodput(("ttft:nan",))


def test_a_busy_machine_is_not_called_quiet(cli: Cli, server: Server) -> None:
    """The server's own work is not noise, and what runs beside it is."""
    asked = ("--concurrency", "1", "--requests", "12", "--tokens", "24")
    beside = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(2)]
    try:
        reasons = bench(cli, server, *asked)["noise"]["reasons"]
    finally:
        for process in beside:
            process.kill()
            process.wait()
    assert any("other processes took" in reason for reason in reasons), reasons


def test_who_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert listener(listening.getsockname()[1]) == os.getpid()
    assert listener(1) is None
