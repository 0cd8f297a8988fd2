"""A server under load: open loop (so many requests a second) or closed (so many clients).

Any server of OpenAI's protocol. In an open loop requests come whether or not earlier ones are
done, as users do; in a closed one a client's next request waits for its last one's end.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from qexport.errors import InputError, QexportError
from qexport.runtime.bench.noise import Noise
from qexport.runtime.bench.processes import family_seconds, listener
from qexport.runtime.bench.statistics import percentiles, request_times
from qexport.runtime.machine import describe

__all__ = [
    "SCHEMA",
    "ServeSettings",
    "check_address",
    "measure_serving",
    "parse_goodput",
]

SCHEMA = "qexport.bench.serve/1"
_METRICS = ("ttft", "tpot", "itl", "e2e")
_WORDS = (
    *("river", "stone", "quiet", "seven", "green", "letter", "window", "under", "morning", "paper"),
    *(
        "travel",
        "little",
        "answer",
        "music",
        "winter",
        "garden",
        "simple",
        "number",
        "early",
        "door",
    ),
)
_HERE = ("localhost", "127.0.0.1", "::1")
_BUSY = 0.5  # of a core, above which the load itself is what is measured
_KEPT_ERRORS = 5
_LONGEST_REASON = 200  # characters
_FEWEST = 4  # requests, to tell anything by
# what reading JSON of another shape raises
_MALFORMED = (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError)


@dataclass(frozen=True)
class ServeSettings:
    """The load.

    levels      requests a second (`open_loop`) or clients: each is measured for itself
    requests    of each level; words of a prompt, and tokens wanted
    burstiness  of an open loop: 1 is Poisson's, less comes in bursts, more is even
    goodput     {metric: milliseconds} that a request has to stay within to count
    ends        whether the model may end its answer; else it goes on to `output` tokens
    timeout     seconds of a whole request
    """

    url: str
    levels: tuple[float, ...]
    open_loop: bool
    requests: int
    words: int
    output: int
    model: str | None = None
    key: str | None = None
    burstiness: float = 1.0
    goodput: dict[str, float] = field(default_factory=dict)
    ends: bool = False
    seed: int = 0
    timeout: float = 600.0


@dataclass
class _Done:
    """What came of one request: times of events, by the clock since it was to be sent."""

    times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int | None = None  # None: the server does not say
    error: str | None = None


def parse_goodput(texts: tuple[str, ...]) -> dict[str, float]:
    """`ttft:500` as {ttft: 500.0}. Raises InputError."""
    found = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in _METRICS or not limit > 0:
            raise InputError(
                f"--goodput {text}: give {', '.join(_METRICS)}, a colon and milliseconds."
            )
        found[name] = limit
    return found


def check_address(url: str, key: str | None) -> None:
    """Raise InputError for an address or a key that no request can be made with."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(f"--url {url} is none ({error}).") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"--url {url} does not begin with http:// or https:// and a host.")
    if parsed.userinfo:
        raise InputError("--url has a password in it, which reports would show; use --api-key.")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise InputError("--api-key has characters that a header cannot hold.")


def measure_serving(settings: ServeSettings, tell: Callable[[str], None]) -> dict[str, Any]:
    """Everything of the report, as JSON has it. Raises QexportError where nobody answers."""
    return asyncio.run(_measure(settings, tell))


async def _measure(settings: ServeSettings, tell: Callable[[str], None]) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {settings.key}"} if settings.key else {}
    bounds = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=settings.url.rstrip("/").removesuffix("/v1"),
        headers=headers,
        timeout=httpx.Timeout(settings.timeout),
        limits=bounds,
        trust_env=False,
    ) as client:
        model = settings.model or await _first_model(client)
        await _ask(client, settings, model, random.Random(-1), time.monotonic())  # warms it up
        levels, reasons, noise = [], [], Noise()
        server = _local_server(client.base_url)

        def own() -> float:
            return time.process_time() + (0.0 if server is None else family_seconds(server))

        for level in settings.levels:
            tell(f"{level:g} {'requests a second' if settings.open_loop else 'clients'}")
            noise.begin(own())
            busy, began = time.process_time(), time.monotonic()
            done = await (_open if settings.open_loop else _closed)(client, settings, model, level)
            seconds = time.monotonic() - began
            noise.end(own())
            share = (time.process_time() - busy) / seconds
            if share > _BUSY:
                reasons.append(f"at {level:g} the load itself took {share:.0%} of a core")
            found = _summary(settings, done, seconds)
            if found["failed"]:
                reasons.append(f"at {level:g} {found['failed']} of {len(done)} requests failed")
            levels.append({"level": level, "seconds": seconds, **found})
        if settings.requests < _FEWEST:
            reasons.append(f"{settings.requests} requests are too few to tell")
        if server is None:
            reasons.append("what others took of the server's machine is not to be seen from here")
        reasons += [] if server is None else noise.taken()
    return {
        "schema": SCHEMA,
        "machine": describe(),
        "settings": {
            **{"url": settings.url, "model": model, "open_loop": settings.open_loop},
            **{"requests": settings.requests, "words": settings.words, "output": settings.output},
            **{"burstiness": settings.burstiness, "goodput": settings.goodput},
            **{"ends": settings.ends, "seed": settings.seed},
        },
        "noise": {"clean": not reasons, "reasons": reasons},
        "levels": levels,
    }


def _local_server(url: httpx.URL) -> int | None:
    """The process that answers there, if it is one of this machine."""
    port = url.port or (443 if url.scheme == "https" else 80)
    return listener(port) if url.host in _HERE else None


async def _first_model(client: httpx.AsyncClient) -> str:
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise QexportError(
            f"{client.base_url} does not list its models ({str(error) or type(error).__name__}); "
            "is a server there, and does it want --api-key?"
        ) from error


async def _open(
    client: httpx.AsyncClient, settings: ServeSettings, model: str, rate: float
) -> list[_Done]:
    """Gaps of a gamma distribution with mean 1 / rate."""
    dice = random.Random(f"{settings.seed} {rate}")
    shape = settings.burstiness
    begin, at, tasks = time.monotonic(), 0.0, []
    for number in range(settings.requests):
        await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
        asked = random.Random(f"{settings.seed} {rate} {number}")
        tasks.append(asyncio.create_task(_ask(client, settings, model, asked, begin + at)))
        at += dice.gammavariate(shape, 1 / (rate * shape))
    return list(await asyncio.gather(*tasks))


async def _closed(
    client: httpx.AsyncClient, settings: ServeSettings, model: str, clients: float
) -> list[_Done]:
    numbers = iter(range(settings.requests))
    done: list[_Done] = []

    async def one() -> None:
        for number in numbers:
            asked = random.Random(f"{settings.seed} {clients} {number}")
            done.append(await _ask(client, settings, model, asked, time.monotonic()))

    await asyncio.gather(*(one() for _ in range(int(clients))))
    return done


async def _ask(
    client: httpx.AsyncClient,
    settings: ServeSettings,
    model: str,
    dice: random.Random,
    due: float,
) -> _Done:
    """One streamed completion. Times count from when it was due, not from when it was sent."""
    body: dict[str, Any] = {
        **{"model": model, "prompt": " ".join(dice.choices(_WORDS, k=settings.words))},
        **{"max_tokens": settings.output, "temperature": 0, "stream": True},
        "stream_options": {"include_usage": True},
    }
    if not settings.ends:
        body["ignore_eos"] = True
    found = _Done()
    try:
        await asyncio.wait_for(_stream(client, body, found, due), settings.timeout)
    except asyncio.TimeoutError:
        found.error = f"no whole answer within {settings.timeout:g} seconds"
    except httpx.HTTPError as error:
        found.error = found.error or f"{type(error).__name__}: {error}".rstrip(": ")
    if found.error is None:
        found.error = _fault(found, settings)
    return found


async def _stream(
    client: httpx.AsyncClient, body: dict[str, Any], found: _Done, due: float
) -> None:
    """Send a request, and take note of its events."""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            text = (await answer.aread()).decode(errors="replace")
            found.error = f"{answer.status_code}: {_one_line(text)}"
            return
        ended = events = False
        async for line in _lines(answer):
            if not line.startswith("data:"):
                continue
            events = True
            if line.endswith("[DONE]"):
                ended = True
                continue
            try:
                _note(found, json.loads(line[5:]), time.monotonic() - due)
            except _MALFORMED:
                found.error = f"an event that is none of a completion: {_one_line(line)}"
        if found.error is None and not ended:
            kind = answer.headers.get("content-type", "nothing")
            found.error = (
                "the stream ended before its end" if events else f"no events came, but {kind}"
            )


async def _lines(answer: httpx.Response) -> AsyncIterator[str]:
    """Of a stream of events, in which \\n alone ends one: httpx also ends them at U+2028."""
    rest = b""
    async for part in answer.aiter_bytes():
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").rstrip("\r")
    if rest:
        yield rest.decode(errors="replace")


def _note(found: _Done, event: dict[str, Any], now: float) -> None:
    """An event of the stream: text, or the usage at its end. Raises what a malformed one does."""
    if "error" in event:
        found.error = _one_line(str(event["error"]))
        return
    usage = event.get("usage")
    if usage:
        found.prompt_tokens = int(usage["prompt_tokens"])
        found.tokens = int(usage["completion_tokens"])
    for choice in event.get("choices", []):
        # half a character is a token without text; an end without text is no token
        if choice["text"] or choice.get("finish_reason") is None:
            found.times.append(now)


def _fault(found: _Done, settings: ServeSettings) -> str | None:
    """What is wrong with an answer that came to its end."""
    if not found.times:
        return "an answer without text"
    if found.tokens is None:
        return None
    # one event more than tokens: some servers begin with an empty one
    if not max(1, len(found.times) - 1) <= found.tokens <= settings.output:
        return (
            f"its usage says {found.tokens} tokens, of {settings.output} asked for and "
            f"{len(found.times)} events"
        )
    if found.tokens < settings.output and not settings.ends:
        return f"{found.tokens} tokens of {settings.output}; --ends lets answers be shorter"
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST_REASON]


def _summary(settings: ServeSettings, done: list[_Done], seconds: float) -> dict[str, Any]:
    whole = [one for one in done if one.error is None]
    errors = [one.error for one in done if one.error is not None]
    times = request_times([one.times for one in whole])
    times["tpot"] = [found for one in whole if (found := _tpot(one)) is not None]
    good = [one for one in whole if _is_good(one, settings.goodput)]
    tokens = sum(_tokens(one) for one in whole)
    return {
        "whole": len(whole),
        "failed": len(errors),
        "errors": list(dict.fromkeys(errors))[:_KEPT_ERRORS],
        "prompt_tokens": sum(one.prompt_tokens for one in whole),
        "tokens": tokens,
        "requests_per_second": len(whole) / seconds,
        "tokens_per_second": tokens / seconds,
        "goodput_per_second": len(good) / seconds if settings.goodput else None,
        "good_share": len(good) / max(1, len(done)) if settings.goodput else None,
        **{name: percentiles(times[name]) for name in _METRICS},
        "samples": [
            {"times": [round(at, 5) for at in one.times], "tokens": _tokens(one)} for one in whole
        ],
    }


def _tokens(one: _Done) -> int:
    """By the server's count, or as many as there were events."""
    return len(one.times) if one.tokens is None else one.tokens


def _tpot(one: _Done) -> float | None:
    """Events may bring several tokens: their mean is by the number of tokens."""
    tokens = _tokens(one)
    return (one.times[-1] - one.times[0]) / (tokens - 1) if tokens > 1 else None


def _is_good(one: _Done, limits: dict[str, float]) -> bool:
    took = {
        "ttft": one.times[0],
        "tpot": _tpot(one) or 0.0,
        "itl": max((after - before for before, after in pairwise(one.times)), default=0.0),
        "e2e": one.times[-1],
    }
    return all(took[name] * 1e3 <= limit for name, limit in limits.items())
