"""Work before an answer: bounded, apart from other work, and dropped when nobody waits for it."""

import asyncio
import concurrent.futures
import json
import shutil
import signal
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest

from qexport.runtime.scheduler import QueueFullError
from qexport.runtime.server.lanes import Lane
from tests.runtime.server.conftest import Server
from tests.runtime.server.test_attacks import SLOW


def test_a_lane_is_bounded_and_drops_what_nobody_waits_for() -> None:
    began: list[int] = []
    go = threading.Event()

    def work(number: int) -> int:
        began.append(number)
        assert go.wait(20)
        return number

    async def ask() -> None:
        lane = Lane("test", 1, 2)
        tasks = [asyncio.ensure_future(lane.run(partial(work, n))) for n in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFullError):
            await lane.run(lambda: 9)
        tasks[1].cancel()  # its client has left
        await asyncio.sleep(0.05)
        late = asyncio.ensure_future(lane.run(partial(work, 3)))
        await asyncio.sleep(0)
        go.set()
        assert [await tasks[0], await tasks[2], await late] == [0, 2, 3]
        assert await lane.run(lambda: 5) == 5

    asyncio.run(ask())
    assert began == [0, 2, 3]


def test_what_a_lane_runs_may_fail() -> None:
    async def ask() -> None:
        lane = Lane("test", 1, 0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await lane.run(lambda: 1 // 0)
            await asyncio.sleep(0.05)

    asyncio.run(ask())


def test_slow_templates_hold_nobody_up(endless: Path, tmp_path: Path) -> None:
    """Fifty chats whose template takes for ever: completions go on, and those who leave are
    forgotten, so that the last chat is not reached after fifty times five seconds."""
    model = tmp_path / "slow"
    shutil.copytree(endless, model)
    (model / "chat_template.jinja").write_text(
        "{% if messages[0].content == 'slow' %}" + SLOW + "{% endif %}{{ messages[0].content }}"
    )
    server = Server(model)

    def chat(content: str, seconds: float) -> int:
        messages = [{"role": "user", "content": content}]
        body = {"model": "slow", "messages": messages, "max_tokens": 2}
        try:
            url = f"{server.url}/chat/completions"
            return httpx.post(url, json=body, timeout=seconds).status_code
        except httpx.ReadTimeout:
            return 0

    try:
        assert chat("quick", 60) == 200
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            slow = [pool.submit(chat, "slow", 3) for _ in range(50)]
            time.sleep(1)
            begin = time.monotonic()
            for _ in range(5):
                body = {"model": "slow", "prompt": "x", "max_tokens": 2}
                assert server.post("/v1/completions", body).status_code == 200
            assert time.monotonic() - begin < 3
            assert {future.result() for future in slow} == {0}
        assert chat("quick", 60) == 200
        assert time.monotonic() - begin < 30
    finally:
        server.stop()
    assert "Traceback" not in server.log, server.log


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_sigkill_leaves_no_process(endless: Path, tmp_path: Path) -> None:
    """The one that renders templates ends by itself, even amid a template that never would."""
    model = tmp_path / "slow"
    shutil.copytree(endless, model)
    (model / "chat_template.jinja").write_text(SLOW)
    server = Server(model)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    workers = [int(child) for child in children.read_text().split()]
    assert workers
    body = {"model": "slow", "messages": [{"role": "user", "content": "x"}]}
    request = json.dumps(body).encode()
    asker = threading.Thread(target=lambda: _ignore(server, request))
    asker.start()
    time.sleep(2)
    server.stop(signal.SIGKILL)
    asker.join()
    end = time.monotonic() + 20
    while any(_alive(worker) for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.1)


def _ignore(server: Server, request: bytes) -> None:
    with suppress(httpx.HTTPError):  # its server is gone
        server.post("/v1/chat/completions", request)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
