"""`qexport bench serve` against our own server."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qexport.errors import InputError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
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


def test_a_server_that_stops_halfway(cli: Cli) -> None:
    """Its answers are failures, not fast ones."""
    listener = socket.create_server(("127.0.0.1", 0))
    body = b'data: {"choices": [{"text": "a"}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"

    def answer() -> None:
        for _ in range(4):
            connection, _ = listener.accept()
            connection.recv(1 << 16)
            connection.sendall(head + body)
            connection.close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    asked = ("--model", "m", "--concurrency", "1", "--requests", "3", "--json")
    result = cli("bench", "serve", "--url", url, *asked)
    listener.close()
    assert result.returncode == 1
    (level,) = json.loads(result.stdout)["levels"]
    assert (level["whole"], level["failed"]) == (0, 3)
    assert "ended before its end" in level["errors"][0]


def test_mistakes_in_a_sentence(cli: Cli, server: Server) -> None:
    for code, said, *arguments in (
        (2, "either --concurrency or --rate"),
        (2, "either --concurrency or --rate", "--concurrency", "1", "--rate", "1"),
        (2, "does not begin with http", "--concurrency", "1", "--url", "localhost"),
        (1, "does not list its models", "--concurrency", "1", "--url", "http://127.0.0.1:9"),
        (1, "401", "--concurrency", "1", "--url", server.root, "--api-key", "wrong"),
        (2, "a colon and milliseconds", "--rate", "1", "--goodput", "speed:1"),
    ):
        result = cli("bench", "serve", *arguments)
        assert result.returncode == code, result.stderr
        assert said in result.stderr and "Traceback" not in result.stderr
    with pytest.raises(InputError):
        parse_goodput(("ttft:nan",))
