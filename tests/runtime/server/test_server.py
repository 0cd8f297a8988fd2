"""The endpoint as clients see it: the official client, raw HTTP, errors, keys, disconnects."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from anyio import to_thread

from qexport.runtime.server import create_app
from qexport.runtime.serving import Serving, open_generator
from tests.conftest import Cli, Runs
from tests.runtime.server.conftest import Server

KEY = "s3cret"


MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


def post(server: Server, path: str, body: Any) -> httpx.Response:
    headers = {"content-type": "application/json"}
    content = json.dumps(body)
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=60)


def test_models(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-4bit"] == [server.model]


def test_chat_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "tiny-4bit", "messages": MESSAGES, "temperature": 0}
    whole = client.chat.completions.create(**common, max_tokens=12)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(
            **common,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_completions_by_text_and_by_tokens(client: openai.OpenAI) -> None:
    text = client.completions.create(model="tiny-4bit", prompt="ab", max_tokens=5, temperature=0)
    ids = client.completions.create(
        model="tiny-4bit", prompt=_ids("ab"), max_tokens=5, temperature=0
    )
    assert text.choices[0].text == ids.choices[0].text
    assert text.usage is not None and ids.usage is not None
    assert text.usage.prompt_tokens == ids.usage.prompt_tokens == 2
    streamed = client.completions.create(
        model="tiny-4bit", prompt="ab", max_tokens=5, temperature=0, stream=True
    )
    assert "".join(c.choices[0].text for c in streamed) == text.choices[0].text


def _ids(text: str) -> list[int]:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    return [alphabet.index(character) for character in text]


def test_a_stream_ends_with_done(server: Server) -> None:
    body = {"model": "tiny-4bit", "messages": MESSAGES, "stream": True, "max_tokens": 3}
    response = post(server, "/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_a_seed_repeats(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(
            model="tiny-4bit", prompt="x", max_tokens=16, temperature=1.5, seed=seed
        )
        return answer.choices[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_stop_strings(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "tiny-4bit", "prompt": "ab", "max_tokens": 20}
    text = client.completions.create(**common, temperature=0).choices[0].text
    stop = text[4]
    stopped = client.completions.create(**common, temperature=0, stop=[stop]).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


CHAT = {"model": "tiny-4bit", "messages": MESSAGES}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/chat/completions", {**CHAT, "model": "other"}, 404, "model"),
        ("/chat/completions", {"model": "tiny-4bit"}, 400, "messages"),
        ("/chat/completions", {**CHAT, "messages": []}, 400, "messages"),
        (
            "/chat/completions",
            {**CHAT, "messages": [{"role": "x", "content": ""}]},
            400,
            "messages",
        ),
        ("/chat/completions", {**CHAT, "max_tokens": "abc"}, 400, "max_tokens"),
        ("/chat/completions", {**CHAT, "max_tokens": -5}, 400, "max_tokens"),
        ("/chat/completions", {**CHAT, "temperature": 9}, 400, "temperature"),
        ("/chat/completions", {**CHAT, "n": 99}, 400, "n"),
        ("/chat/completions", {**CHAT, "best_of": 2}, 400, "best_of"),
        ("/chat/completions", {**CHAT, "max_tokens": True}, 400, "max_tokens"),
        ("/chat/completions", {**CHAT, "max_tokens": "8"}, 400, "max_tokens"),
        ("/chat/completions", {**CHAT, "guided_json": {}}, 400, "guided_json"),
        ("/chat/completions", {**CHAT, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ("/chat/completions", {**CHAT, "stop": ["a"] * 17}, 400, "stop"),
        ("/chat/completions", {**CHAT, "stop": ""}, 400, "stop"),
        ("/chat/completions", {**CHAT, "max_tokens": 100000}, 400, None),
        ("/completions", {"model": "tiny-4bit", "prompt": ""}, 400, None),
        ("/completions", {"model": "tiny-4bit", "prompt": [99999]}, 400, None),
        ("/completions", {"model": "tiny-4bit", "prompt": "\ud800"}, 400, None),
        ("/completions", {"model": "x" * 10_000, "prompt": "a"}, 404, "model"),
        ("/completions", {"model": "tiny-4bit", "prompt": [-1]}, 400, "prompt"),
        ("/completions", {"model": "tiny-4bit", "prompt": {"a": 1}}, 400, "prompt"),
    ],
)
def test_errors_have_openais_form(
    server: Server, path: str, body: Any, status: int, param: str | None
) -> None:
    for stream in (False, True):
        response = post(server, path, {**body, "stream": stream})
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param
        assert len(response.content) < 2000


def test_bodies_that_are_not_requests(server: Server) -> None:
    for content, said in (
        (b"", "the body is no JSON object."),
        (b"[]", "the body is no JSON object."),
        (b'"text"', "the body is no JSON object."),
        (b"{", "the body is not JSON ("),
        (b'{"temperature": NaN}', ""),
        (b"\xff", ""),
    ):
        response = httpx.post(
            f"{server.url}/chat/completions",
            content=content,
            headers={"content-type": "application/json"},
        )
        assert response.status_code == 400, content
        assert response.json()["error"]["message"].startswith(said), response.text
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server.url}/completions").status_code == 405


def test_curls_own_content_type_is_named(server: Server) -> None:
    content = json.dumps({"model": server.model, "prompt": "a"})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = httpx.post(f"{server.url}/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert "send content-type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize("key", [(), ("--api-key", KEY)])
def test_a_client_that_goes_away_frees_the_model(endless: Path, key: tuple[str, ...]) -> None:
    """Each abandoned stream would run for minutes; the next request is answered in seconds."""
    server = Server(endless, "--slots", "1", *key)
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {
        "model": "long",
        "prompt": "ab",
        "stream": True,
        "max_tokens": 190_000,
        "seed": 1,
    }
    try:
        for index in range(6):
            with httpx.stream(
                "POST", f"{server.url}/completions", json=body, headers=headers
            ) as response:
                lines = response.iter_lines()
                for _ in range(1 + 40 * index):
                    next(lines)
            short = {"model": "long", "prompt": "x", "max_tokens": 1}
            answer = httpx.post(
                f"{server.url}/completions", json=short, headers=headers, timeout=20
            )
            assert answer.status_code == 200
    finally:
        server.stop()


def test_requests_that_wait_do_not_hold_up_those_that_run(tiny_model: Path) -> None:
    """Nobody waits in a thread: with a single one for the whole application all are answered."""

    async def ask(count: int) -> list[int]:
        to_thread.current_default_thread_limiter().total_tokens = 1
        with open_generator(tiny_model, Serving(slots=2)) as generator:
            transport = httpx.ASGITransport(create_app(generator, "tiny"))
            body = {"model": "tiny", "prompt": [1, 2], "max_tokens": 4, "stream": True}
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as asker:
                asked = [asker.post("/v1/completions", json=body) for _ in range(count)]
                return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert asyncio.run(asyncio.wait_for(ask(30), 60)) == [200] * 30


@pytest.mark.parametrize("count", [8, 60])
def test_requests_that_come_together_are_all_answered(client: openai.OpenAI, count: int) -> None:
    """Also where more wait than a thread pool has threads."""
    found: list[str] = []

    def ask() -> None:
        answer = client.completions.create(
            model="tiny-4bit", prompt="ab", max_tokens=8, temperature=0
        )
        found.append(answer.choices[0].text)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count
    assert len(set(found)) == 1


def test_a_key_guards_every_route_but_health(runs: Runs) -> None:
    server = Server(runs("4"), "--api-key", KEY, "--served-model-name", "mine")
    try:
        root = server.url.removesuffix("/v1")
        assert httpx.get(f"{root}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            response = httpx.get(f"{server.url}/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert httpx.get(f"{root}/openapi.json", headers=headers).status_code == 401
        client = openai.OpenAI(base_url=server.url, api_key=KEY)
        assert [model.id for model in client.models.list()] == ["mine"]
    finally:
        assert server.stop() in (0, 143, -15)


def test_it_does_not_open_up_by_accident(cli: Cli, runs: Runs, server: Server) -> None:
    result = cli("serve", runs("4"), "--host", "0.0.0.0")
    assert result.returncode == 2
    assert "add --api-key or --insecure" in result.stderr
    port = server.url.split(":")[2].split("/")[0]
    result = cli("serve", runs("4"), "--port", port)
    assert result.returncode == 2
    assert f"port {port} is taken" in result.stderr
