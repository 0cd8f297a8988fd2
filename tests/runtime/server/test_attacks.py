"""Attacks that other servers fell to, each against a running one (CVE numbers where there are)."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qexport.errors import InputError
from qexport.runtime.templates import TemplateWorker
from tests.runtime.server.conftest import Server

CHAT: dict[str, Any] = {
    "model": "tiny-4bit",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 4,
}
TEXT = {"model": "tiny-4bit", "prompt": "ab", "max_tokens": 4}


@pytest.fixture
def served(server: Server) -> Iterator[Server]:
    """The server, which still answers afterwards."""
    yield server
    assert server.post("/v1/completions", TEXT).status_code == 200
    assert httpx.get(f"{server.root}/health").status_code == 200


def refused(served: Server, path: str, body: Any, status: int = 400) -> None:
    begin = time.monotonic()
    answer = served.post(path, body)
    assert answer.status_code == status, answer.text[:500]
    assert time.monotonic() - begin < 10
    assert len(answer.content) < 2000, "a request must not choose the size of its answer"
    assert answer.json()["error"]["message"]


def test_numbers_out_of_all_proportion(served: Server) -> None:
    """Huge n (CVE-2026-34756), negative and endless numbers, prompt_logprobs of -1."""
    extras: list[dict[str, Any]] = [
        {"n": 16_384},
        {"n": 10**30},
        {"n": -1},
        {"max_tokens": 10**18},
        {"max_tokens": -1},
        {"top_k": -2},
        {"seed": 2**64},
        {"temperature": 1e308},
        {"logprobs": 10**6},
        {"prompt_logprobs": -1},
        {"n_discard": -1},
        {"logit_bias": {str(i): 1e9 for i in range(100)}},
        {"logit_bias": {"9" * 4000: 1}},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [10**18]},
    ]
    for extra in extras:
        refused(served, "/v1/completions", {**TEXT, **extra})


def test_numbers_that_are_none(served: Server) -> None:
    for text in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        body = json.dumps(TEXT).encode()[:-1] + b', "temperature": ' + text + b"}"
        refused(served, "/v1/completions", body)


def test_half_a_million_stops(served: Server) -> None:
    """54 seconds elsewhere."""
    refused(served, "/v1/completions", {**TEXT, "stop": ["a"] * 500_000})
    refused(served, "/v1/completions", {**TEXT, "stop": "a" * 1_000_000})


def test_a_request_brings_no_template(served: Server) -> None:
    """CVE-2026-5760, CVE-2025-62426."""
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    refused(served, "/v1/chat/completions", {**CHAT, "chat_template": evil})
    for name in ("chat_template", "tokenize", "messages", "template", "tools"):
        variables = {"chat_template_kwargs": {name: evil}}
        refused(served, "/v1/chat/completions", {**CHAT, **variables})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 99_999_989},
        {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(1, 40)]},
    ],
    ids=["multipleOf", "allOf"],
)
def test_schemas_that_take_for_ever(server: Server, schema: Any) -> None:
    """44 bytes that compile without an end, in 80 MB more each second."""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    begin = time.monotonic()
    answer = server.post("/v1/chat/completions", {**CHAT, "response_format": wanted})
    assert answer.status_code == 400, answer.text[:300]
    assert "answers can be held to: it" in answer.json()["error"]["message"]
    assert time.monotonic() - begin < 30
    held = {**CHAT, "response_format": {"type": "json_object"}}  # others are answered as before
    assert server.post("/v1/chat/completions", held).status_code == 200
    assert server.post("/v1/completions", {**TEXT, "logprobs": 1}).status_code == 200


def test_schemas_that_explode(served: Server) -> None:
    """CVE-2025-48944, CVE-2025-58446: size, depth, counts, references that go round."""

    def nested(depth: int) -> Any:
        schema: Any = {"type": "string"}
        for _ in range(depth):
            schema = {"type": "array", "items": schema}
        return schema

    schemas: list[Any] = [
        nested(200),
        {"enum": [f"{i:040}" for i in range(20_000)]},
        {"$ref": "#"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "http://127.0.0.1:1/x"},
        {"type": "string", "pattern": "(a+)+$("},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "no such type"},
        {"not": {}},
    ]
    for schema in schemas:
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {**CHAT, "response_format": wanted}
        begin = time.monotonic()
        answer = served.post("/v1/chat/completions", body)
        assert answer.status_code in (200, 400), answer.text[:300]
        assert time.monotonic() - begin < 15, schema
    wide = {"type": "array", "items": {"type": "string", "maxLength": 10**6}, "minItems": 10**6}
    body = {
        **CHAT,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": wide}},
    }
    assert served.post("/v1/chat/completions", body).status_code in (200, 400)
    tool = {"type": "function", "function": {"name": "f", "parameters": nested(200)}}
    refused(served, "/v1/chat/completions", {**CHAT, "tools": [tool], "tool_choice": "required"})


def test_bodies_that_nest_without_end(served: Server) -> None:
    for text in (b"[" * 100_000, b'{"a":' * 100_000, json.dumps(TEXT).encode() + b"]" * 1000):
        refused(served, "/v1/completions", text)


def test_a_small_body_gets_no_large_answer(served: Server) -> None:
    """4 KB once came back as 23.6 MB of validation errors."""
    messages = [{"role": "nobody", "content": {"x": 1}}] * 500
    refused(served, "/v1/chat/completions", {**CHAT, "messages": messages})
    refused(served, "/v1/completions", {**TEXT, "prompt": [{"a": 1}] * 5000})
    refused(served, "/v1/completions", {**TEXT, "x" * 3000: 1})
    refused(served, "/v1/completions", {**TEXT, "model": "x" * 100_000}, 404)


def test_half_a_character_is_refused_everywhere(served: Server) -> None:
    """JSON can spell what Unicode cannot."""
    half = "a\ud800"
    chat = {**CHAT, "messages": [{"role": "user", "content": half}]}
    for path, body in (
        ("/v1/completions", {**TEXT, "prompt": half}),
        ("/v1/completions", {**TEXT, "stop": half}),
        ("/v1/completions", {**TEXT, "stop": ["a", half]}),
        ("/v1/chat/completions", chat),
        ("/v1/responses", {"model": "tiny-4bit", "input": half}),
        ("/tokenize", {"prompt": half}),
    ):
        assert served.post(path, body).status_code == 400, body


def test_responses_refuse_what_only_chats_would_notice(served: Server) -> None:
    extras: list[dict[str, Any]] = [
        {"input": []},
        {"input": "x", "instructions": "", "text": {"format": {"type": "json_schema"}}},
        {"input": [{"role": "user", "content": []}], "temperature": 3},
        {"input": "x", "text": {"format": {"type": "json_schema", "name": "/", "schema": {}}}},
        {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]},
    ]
    for extra in extras:
        refused(served, "/v1/responses", {"model": "tiny-4bit", **extra})


def test_large_bodies_that_are_wrong_are_refused_soon(served: Server) -> None:
    """Each error of a list takes time to describe, and one is enough."""
    begin = time.monotonic()
    refused(served, "/v1/completions", {**TEXT, "prompt": [-1] * 700_000})
    refused(served, "/v1/completions", {**TEXT, "prompt": [[-1]] * 500_000})
    refused(served, "/detokenize", {"tokens": ["x"] * 700_000})
    refused(served, "/v1/chat/completions", {**CHAT, "messages": [{"role": 1}] * 200_000})
    assert time.monotonic() - begin < 20


def test_models_are_not_paths(served: Server) -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "tiny-4bit/../tiny-4bit", "", "\x00"):
        refused(served, "/v1/completions", {**TEXT, "model": name}, 404)
    for path in ("/..%2f..%2fetc%2fpasswd", "/page.js/../../app.py", "//etc/passwd"):
        assert httpx.get(served.root + path).status_code in (400, 404)


def test_control_routes_are_not_there(served: Server) -> None:
    """Elsewhere a GET ends the server, loads a model, or shows what others ask."""
    for path in ("/terminate", "/load_model", "/reset", "/slots", "/props", "/docs", "/redoc"):
        assert httpx.get(f"{served.root}{path}").status_code == 404, path
        assert served.post(path, {}).status_code == 404, path


SLOW = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        SLOW,
        "{{ '%0999999999d' % 1 }}",
        "{{ 'x' * 10**10 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{% for",
        "{{ raise_exception('no') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
    ids=[
        "loops",
        "format",
        "repeat",
        "classes",
        "globals",
        "include",
        "syntax",
        "raise",
        "recursion",
    ],
)
def test_a_checkpoints_template_cannot_hurt(template: str) -> None:
    """CVE-2024-34359; and loops and formats that transformers' sandbox lets run."""
    worker = TemplateWorker(seconds=2, memory=256 << 20)
    try:
        assert worker.render("{{ messages[0].content }}", [{"content": "x"}]) == "x"
        begin = time.monotonic()
        with pytest.raises(InputError, match="the chat template refuses"):
            worker.render(template, [])
        assert time.monotonic() - begin < 10
        assert worker.render("{{ messages[0].content }}", [{"content": "y"}]) == "y"
    finally:
        worker.close()


def test_a_slow_template_holds_nobody_up(endless: Path, tmp_path: Path) -> None:
    """Streams go on while a template is on its way to being killed."""
    import shutil

    model = tmp_path / "slow"
    shutil.copytree(endless, model)
    (model / "chat_template.jinja").write_text(SLOW)
    server = Server(model)
    try:
        body = {"model": "slow", "messages": [{"role": "user", "content": "x"}]}
        import concurrent.futures

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            slow = pool.submit(server.post, "/v1/chat/completions", body)
            time.sleep(0.5)
            begin = time.monotonic()
            short = {"model": "slow", "prompt": "x", "max_tokens": 2}
            assert server.post("/v1/completions", short).status_code == 200
            assert time.monotonic() - begin < 3
            answer = slow.result(timeout=90)
        assert answer.status_code == 400
        assert "too long" in answer.json()["error"]["message"]
    finally:
        server.stop()
