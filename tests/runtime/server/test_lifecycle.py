"""The beginning and the end: drains, signals, crashes, stalls, leaks."""

import concurrent.futures
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from qexport.runtime.model import Decoder
from qexport.runtime.server import Limits, create_app
from qexport.runtime.serving import Serving, open_generator
from tests.runtime.server.conftest import Server


def stream(server: Server, tokens: int, started: threading.Event | None = None) -> list[Any]:
    """Events of one stream, to its end."""
    body = {"model": server.model, "prompt": "ab", "max_tokens": tokens, "stream": True, "seed": 1}
    found: list[Any] = []
    with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line:
                found.append(line.removeprefix("data: "))
                if started is not None:
                    started.set()
    assert found[-1] == "[DONE]"
    return [json.loads(event) for event in found[:-1]]


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something, but not for ever."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_sigterm_loses_no_answer(endless: Path) -> None:
    """What runs is finished, what comes is refused, and then it ends by itself."""
    server = Server(endless, "--slots", "2")
    begun = [threading.Event() for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stream, server, 15_000, event) for event in begun]
        for event in begun:
            assert event.wait(30)
        waiting = [pool.submit(stream, server, 20) for _ in range(2)]
        until(lambda: server.status()["waiting"] == 2)
        server.process.send_signal(signal.SIGTERM)
        for future in running + waiting:
            events = future.result(timeout=60)
            assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(timeout=30) == 0
    server.stop()
    assert "Traceback" not in server.log, server.log


def test_the_deadline_ends_streams_with_an_error(endless: Path) -> None:
    server = Server(endless, "--limit", "drain_seconds=1")
    begun = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(stream, server, 100_000, begun)
        assert begun.wait(30)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        events = future.result(timeout=30)
    assert "shut down" in events[-1]["error"]["message"]
    server.process.wait(timeout=30)
    server.stop()
    assert time.monotonic() - begin < 15
    assert "Traceback" not in server.log, server.log


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(endless: Path, sig: signal.Signals) -> None:
    server = Server(endless)
    begun = threading.Event()
    body = {"model": "long", "prompt": "ab", "max_tokens": 100_000, "stream": True}

    def ask() -> None:
        try:
            with httpx.stream("POST", f"{server.url}/completions", json=body) as response:
                for _ in response.iter_lines():
                    begun.set()
        except httpx.HTTPError:
            pass  # its server is gone

    asker = threading.Thread(target=ask)
    asker.start()
    assert begun.wait(30)
    server.process.send_signal(sig)
    time.sleep(0.5)
    begin = time.monotonic()
    assert server.stop(sig) == 128 + sig
    assert time.monotonic() - begin < 5
    asker.join()


def test_after_sigkill_it_serves_again(packed: Path) -> None:
    server = Server(packed, "--served-model-name", "m")
    assert server.post("/v1/completions", {"model": "m", "prompt": "a"}).status_code == 200
    server.stop(signal.SIGKILL)
    again = Server(packed, "--served-model-name", "m", "--port", str(server.port))
    assert again.post("/v1/completions", {"model": "m", "prompt": "a"}).status_code == 200
    again.stop()


class Broken(Decoder):
    """Breaks or stalls when it is told to."""

    slots, context, vocabulary, kernels = 2, 64, 40, "broken"

    def __init__(self) -> None:
        self.stall = threading.Event()
        self.crash = False

    def forward(self, spans: Any) -> Any:
        import torch

        if self.crash:
            raise SystemExit  # no Exception: nothing catches it but the end of the thread
        self.stall.wait(60)
        return torch.zeros(sum(span.logits for span in spans), 40)


def test_health_tells_a_stall_and_a_crash(tiny_model: Path) -> None:
    with open_generator(tiny_model, Serving()) as generator:
        decoder = Broken()
        generator.decoder = decoder
        generator.context = 64
        app = create_app(generator, "m", limits=Limits(stall_seconds=0.3))
        with TestClient(app) as client:
            assert client.get("/health").status_code == 200
            body = {"model": "m", "prompt": [1], "max_tokens": 1}
            asker = threading.Thread(
                target=client.post, args=("/v1/completions",), kwargs={"json": body}
            )
            asker.start()
            until(lambda: client.get("/health").status_code == 503)
            assert client.get("/ready").status_code == 503
            decoder.stall.set()
            asker.join()
            until(lambda: client.get("/health").status_code == 200)  # its answer came first
            decoder.crash = True
            for _ in range(2):  # the one that it crashes over, and one that comes after
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code in (500, 503)
                assert "crashed" in answer.json()["error"]["message"]
            assert client.get("/health").status_code == 503


def test_a_full_queue_is_told(endless: Path) -> None:
    server = Server(endless, "--slots", "1", "--limit", "queue=1")
    begun = threading.Event()
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first = pool.submit(stream, server, 15_000, begun)
            assert begun.wait(30)
            second = pool.submit(stream, server, 1)
            until(lambda: server.status()["waiting"] == 1)
            body = {"model": "long", "prompt": "a", "max_tokens": 1}
            answer = server.post("/v1/completions", body)
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            first.result(), second.result()
        text = httpx.get(f"{server.root}/metrics").text
        assert 'vllm:admission_rejections_total{model_name="long"} 1.0' in text
    finally:
        server.stop()


def _held(process: int) -> dict[str, int]:
    """Threads, open files and memory (in MB) of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    words = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "threads": int(words["Threads"]),
        "files": len(list(Path(f"/proc/{process}/fd").iterdir())),
        "memory": int(words["VmRSS"].split()[0]) >> 10,
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
def test_a_thousand_clients_that_go_leave_nothing(endless: Path) -> None:
    server = Server(endless, "--slots", "4", "--limit", "queue=2000")
    body = {"model": "long", "prompt": "ab", "max_tokens": 50_000, "stream": True}

    def leave(index: int) -> None:
        with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=60) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            for _ in range(index % 3):
                next(lines, None)

    def round_of(count: int) -> dict[str, int]:
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            list(pool.map(leave, range(count)))
        until(lambda: not any(server.status()[name] for name in ("running", "waiting")), 60)
        time.sleep(1)
        return _held(server.process.pid)

    try:
        before = round_of(200)
        after = round_of(1000)
        assert after["threads"] <= before["threads"]
        assert after["files"] <= before["files"] + 1
        assert after["memory"] <= before["memory"] * 1.05 + 8, (before, after)
    finally:
        server.stop()
    assert "Traceback" not in server.log
