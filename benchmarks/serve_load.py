"""64 streams at a time against our server, llama.cpp's and vLLM's CPU build: losses and speed.

`python -m benchmarks.serve_load` serves SmolLM2 with int4 weights in groups of 32 (llama.cpp the
same codes as Q4_0, vLLM as GPTQ, and the dense model in bfloat16, which is what its CPU build is
made for) and sends prompts of mixed lengths for --seconds to each in turn:
a tenth of the clients leave in the middle, one in fifty sends something malformed. Every whole
answer of ours is compared with the same prompt's answer alone. TTFT is the time to the first token
of text, TPOT that of the others divided by their number; memory is the server's resident set.
"""

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.decode import LLAMA, VLLM, rounded
from benchmarks.machine import record
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.base import Options
from qexport.formats.pack import pack

STREAMS, SLOTS, CONTEXT = 64, 16, 1024
WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog", "seven", "wizards", "quietly")


@dataclass(frozen=True)
class Ask:
    """One prompt and how many tokens are wanted."""

    prompt: str
    tokens: int


@dataclass
class Tally:
    """What came of a load."""

    whole: int = 0
    cancelled: int = 0
    malformed: int = 0
    lost: list[str] = field(default_factory=list)
    differing: int = 0
    server_errors: int = 0
    tokens: float = 0
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


def asks(count: int = 24) -> list[Ask]:
    """Prompts of 5 to 300 words, answers of 8 to 96 tokens."""
    dice = random.Random(7)
    return [
        Ask(
            " ".join(dice.choices(WORDS, k=dice.choice((5, 20, 60, 150, 300)))),
            dice.choice((8, 24, 48, 96)),
        )
        for _ in range(count)
    ]


async def stream(
    port: int, model: str, ask: Ask, leave_after: int | None
) -> tuple[int, list[float], str, int]:
    """Status, times of pieces of text, the text, and its tokens as the server counts them.

    Raw HTTP: the client is to cost little.
    """
    body = {"model": model, "prompt": ask.prompt, "max_tokens": ask.tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    content = json.dumps({**body, "temperature": 0}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        times: list[float] = []
        text, tokens = "", 0
        done = False
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                done = True
                break
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            if event.get("choices") and event["choices"][0].get("text"):
                times.append(time.monotonic())
                text += event["choices"][0]["text"]
                if leave_after is not None and len(times) >= leave_after:
                    return status, times, text, len(times)
        if status == 200 and not done:
            raise ConnectionError("the stream ended before its end")
        return status, times, text, tokens
    finally:
        writer.close()


async def malformed(port: int, dice: random.Random) -> int:
    """The status of a request that is none; 0 where the connection was closed."""
    bodies = (
        b"{",
        b'{"model": 1}',
        b'{"model": "m", "prompt": "x", "max_tokens": -1}',
        b"\xff\xfe",
    )
    content = dice.choice(bodies)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        length = len(content)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
        writer.write(
            head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + content
        )
        line = await reader.readline()
        return int(line.split()[1]) if line else 0
    finally:
        writer.close()


async def load(
    port: int, model: str, pid: int, seconds: float, alone: dict[Ask, str] | None
) -> Tally:
    """So many clients, each asking again and again until the time is over."""
    tally, choices = Tally(), asks()
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < end:
            ask, kind = dice.choice(choices), dice.random()
            try:
                if kind < 0.02:
                    status = await malformed(port, dice)
                    tally.malformed += 1
                    tally.server_errors += status >= 500
                    continue
                began = time.monotonic()
                leave = dice.randrange(1, 6) if kind < 0.12 else None
                status, times, text, tokens = await stream(port, model, ask, leave)
            except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as error:
                tally.lost.append(repr(error)[:100])
                continue
            tally.server_errors += status >= 500
            if times:  # several tokens may come as one piece; those after the end do not count
                tally.tokens += tokens * sum(at <= end for at in times) / len(times)
            if leave is not None:
                tally.cancelled += 1
                continue
            tally.whole += 1
            if times:
                tally.first.append(times[0] - began)
            if len(times) > 1:
                tally.each.append((times[-1] - times[0]) / (len(times) - 1))
            if alone is not None and text != alone[ask]:
                tally.differing += 1

    async def watch() -> None:
        while time.monotonic() < end:
            tally.memory.append(_memory(pid))
            await asyncio.sleep(2)

    await asyncio.gather(watch(), *(client(number) for number in range(STREAMS)))
    return tally


def _memory(pid: int) -> float:
    """MiB that a process and its children hold."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(path.parent.name) == pid or int(fields[1]) == pid:
                total += int(fields[21])
        except (OSError, ValueError, IndexError):  # noqa: PERF203
            continue  # it ended meanwhile
    return total * 4096 / 2**20


@contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[int]:
    """A server that answers; its process id."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0 and _healthy(port):
                        break
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.5)
            yield process.pid
        finally:
            process.terminate()
            process.wait(timeout=60)


def _healthy(port: int) -> bool:
    import httpx

    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def summary(tally: Tally, seconds: float) -> dict[str, Any]:
    """Figures of one server."""

    def percentiles(values: list[float]) -> dict[str, float]:
        ordered = sorted(values) or [float("nan")]
        return {
            f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 4)
            for p in (50, 95, 99)
        }

    half = tally.memory[len(tally.memory) // 3 :] or [0.0]  # of three minutes, the last two
    return {
        **{"tokens/s": round(tally.tokens / seconds, 1), "whole answers": tally.whole},
        **{"cancelled": tally.cancelled, "malformed": tally.malformed},
        **{"lost": len(tally.lost), "why": tally.lost[:3], "5xx": tally.server_errors},
        **{"differing": tally.differing},
        **{"TTFT s": percentiles(tally.first), "TPOT s": percentiles(tally.each)},
        "memory MiB": [round(statistics.median(half[:5])), round(statistics.median(half[-5:]))],
    }


def main() -> None:
    """Serve, load, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180)
    options = parser.parse_args()
    from benchmarks.demo import fetch

    results: dict[str, Any] = {"streams": STREAMS, "slots": SLOTS, "seconds": options.seconds}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = rounded(open_checkpoint(fetch()), "int4", 32)
        pack(source, FORMATS["native"], work / "m")
        pack(source, FORMATS["gguf"], work / "gguf", Options())
        gguf = next((work / "gguf").glob("*.gguf"))
        ours = [sys.executable, "-m", "qexport", "serve", str(work / "m"), "--port", "8301"]
        llama = [str(LLAMA / "llama-server"), "-m", str(gguf), "--port", "8302", "-t", "2"]
        module = "vllm.entrypoints.openai.api_server"  # its command wants a package named vllm
        pack(source, FORMATS["gptq"], work / "gptq")
        vllm = [str(VLLM), "-m", module, "--dtype", "bfloat16", "--served-model-name", "m"]
        vllm += ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(SLOTS)]
        servers = {
            "qexport": [*ours, "--slots", str(SLOTS), "--context", str(CONTEXT)],
            "llama-server": [
                *(*llama, "-np", str(SLOTS), "-c", str(SLOTS * CONTEXT), "--alias", "m"),
            ],
            "vllm int4": [*vllm, "--model", str(work / "gptq"), "--port", "8303"],
            "vllm bfloat16": [*vllm, "--model", str(fetch()), "--port", "8304"],
        }
        for index, (name, command) in enumerate(servers.items()):
            if not Path(command[0]).exists():
                results[name] = "not installed"
                continue
            port = 8301 + index
            with serving(command, port, work / f"{name}.log") as pid:
                # every prompt once: caches of prefixes begin warm, everybody's
                alone = {ask: asyncio.run(stream(port, "m", ask, None))[2] for ask in asks()}
                compared = alone if name == "qexport" else None
                tally = asyncio.run(load(port, "m", pid, options.seconds, compared))
            results[name] = summary(tally, options.seconds)
            print(name, json.dumps(results[name]), flush=True)
    record("serve_load", results)


if __name__ == "__main__":
    main()
