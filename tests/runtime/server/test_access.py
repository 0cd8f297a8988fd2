"""Who may ask: keys, names, sites; and what is written down of it."""

import base64
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from qexport.runtime.server import Limits, RequestLog, create_app
from qexport.runtime.serving import Serving, open_generator
from qexport.tiny import write_tiny_model
from tests.conftest import Cli, Runs
from tests.runtime.server.conftest import Server

BODY = {"model": "m", "prompt": "ab", "max_tokens": 3, "temperature": 0}


App = Callable[..., TestClient]


@pytest.fixture
def app_of(tiny_model: Path) -> Iterator[App]:
    """Makes clients of applications over the tiny model."""
    with ExitStack() as stack:

        def make(**options: Any) -> TestClient:
            generator = stack.enter_context(open_generator(tiny_model, Serving(slots=2)))
            return TestClient(create_app(generator, "m", **options))

        yield make


def test_any_of_several_keys(app_of: App) -> None:
    client = app_of(keys=["one", "two"])
    basic = base64.b64encode(b"me:two").decode()
    good: list[dict[str, str]] = [
        {"Authorization": "Bearer one"},
        {"Authorization": "bearer two"},
        {"X-Api-Key": "two"},
        {"Authorization": f"Basic {basic}"},
        {"Authorization": f"Basic {basic}", "Sec-Fetch-Site": "same-origin"},
        {"Authorization": f"Basic {basic}", "Origin": "http://testserver"},
    ]
    bad: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer three"},
        {"Authorization": "Basic !!"},
        {"Authorization": "one"},
        # another site's page, whose request the browser signs for its user
        {"Authorization": f"Basic {basic}", "Sec-Fetch-Site": "cross-site"},
        {"Authorization": f"Basic {basic}", "Origin": "http://testserver.evil.example"},
        {"Authorization": f"Basic {basic}", "Origin": "null"},
    ]
    for headers in good:
        assert client.get("/v1/models", headers=headers).status_code == 200, headers
    for headers in bad:
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == 401, headers
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_names_of_other_sites_are_refused(app_of: App) -> None:
    """A name that was bound to 127.0.0.1 by somebody else's DNS is not ours."""
    client = app_of(hosts=["127.0.0.1", "localhost", "[::1]"])
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"):
        assert client.get("/version", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        assert client.get("/version", headers={"Host": host}).status_code == 421, host


def test_no_site_may_ask_unless_it_is_named(app_of: App) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    closed = app_of().options("/v1/completions", headers=asked)
    assert "access-control-allow-origin" not in closed.headers
    opened = app_of(origins=["https://a.example"])
    answer = opened.options("/v1/completions", headers=asked)
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    other = opened.options("/v1/completions", headers={**asked, "Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_keys_of_files_and_the_environment(runs: Runs, tmp_path: Path, cli: Cli) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    server = Server(runs("4"), "--api-key-file", str(keys), "--host", "0.0.0.0")
    root = server.root.replace("0.0.0.0", "127.0.0.1")
    try:
        for key, status in (("one", 200), ("two", 200), ("three", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{root}/v1/models", headers=headers).status_code == status
    finally:
        server.stop()
    env = {**os.environ, "QEXPORT_SERVE_API_KEY": "four", "QEXPORT_SERVE_LIMIT": "body=50"}
    server = Server(runs("4"), env=env)
    try:
        assert httpx.get(f"{server.url}/models").status_code == 401
        headers = {"Authorization": "Bearer four"}
        assert httpx.get(f"{server.url}/models", headers=headers).status_code == 200
        assert server.post("/v1/completions", BODY, headers=headers).status_code == 413
    finally:
        server.stop()
    keys.write_text("\n")
    for wrong in (("--api-key-file", keys), ("--api-key", ""), ("--limit", "queue=x")):
        result = cli("serve", runs("4"), *wrong)
        assert result.returncode == 2, wrong
        assert "Traceback" not in result.stderr
    result = cli("serve", runs("4"), "--limit", "speed=1")
    assert "there is no limit 'speed'; there are queue, body" in result.stderr


@pytest.mark.parametrize("with_prompts", [False, True])
def test_the_log_has_prompts_only_where_asked(
    app_of: App, tmp_path: Path, with_prompts: bool
) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLog(str(path), with_prompts)
    client = app_of(log=log)
    assert client.post("/v1/completions", json={**BODY, "prompt": "secret"}).status_code == 200
    assert client.post("/v1/completions", json={**BODY, "stream": True}).status_code == 200
    chat = {"model": "m", "messages": [{"role": "user", "content": "secret"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=chat).status_code == 200
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["route"].rpartition("/")[2] for line in lines] == ["completions"] * 3
    assert [line["stream"] for line in lines] == [False, True, False]
    for line in lines:
        assert line["status"] == 200 and line["error"] is None
        assert 0 < line["ttft_s"] <= line["seconds"]
        assert line["completion_tokens"] > 0 and line["prompt_tokens"] > 0
    assert ("secret" in path.read_text()) == with_prompts


def test_metrics_count(app_of: App) -> None:
    client = app_of()
    for _ in range(3):
        assert client.post("/v1/completions", json=BODY).status_code == 200
    lines = client.get("/metrics").text.splitlines()
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if "{" in line
    }
    name = '{model_name="m"}'
    assert values[f"vllm:prompt_tokens_total{name}"] == 6
    assert values[f"vllm:generation_tokens_total{name}"] == 9
    assert values[f"vllm:time_to_first_token_seconds_count{name}"] == 3
    assert values[f"vllm:inter_token_latency_seconds_count{name}"] == 6
    assert values[f"vllm:num_requests_running{name}"] == 0
    assert values['vllm:request_success_total{finished_reason="length",model_name="m"}'] == 3


def test_whatever_can_be_got_has_a_head(app_of: App) -> None:
    client = app_of()
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/", "/page.js"):
        answer = client.head(path)
        assert answer.status_code == 200, path
    assert client.head("/v1/completions").status_code == 405


def test_metrics_of_what_was_not_finished(endless: Path) -> None:
    server = Server(endless)
    body = {"model": "long", "prompt": "ab", "max_tokens": 50_000, "stream": True}
    with httpx.stream("POST", f"{server.url}/completions", json=body) as got:
        next(got.iter_lines())
    try:
        name = 'vllm:request_success_total{finished_reason="abort",model_name="long"} 1.0'
        end = time.monotonic() + 20
        while name not in (text := httpx.get(f"{server.root}/metrics").text):
            assert time.monotonic() < end
        assert 'vllm:e2e_request_latency_seconds_count{model_name="long"} 0.0' in text
    finally:
        server.stop()


def test_repeatable_options_of_a_file(tmp_path: Path, runs: Runs) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("api-key: [one, two]\nlimit:\n- body=50\nserved-model-name: mine\n")
    server = Server(runs("4"), "--config", str(file))
    try:
        for key, status in (("one", 413), ("two", 413), ("three", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert server.post("/v1/completions", BODY, headers=headers).status_code == status
        assert server.model == "mine"
    finally:
        server.stop()


def test_more_memory_than_there_is(tiny_model: Path, cli: Cli) -> None:
    """Said before any of it is taken."""
    large = write_tiny_model(tiny_model.parent / "large", max_position_embeddings=2**30)
    result = cli("serve", large, "--port", "0", "--slots", "256", "--context", str(2**30))
    assert result.returncode == 2
    assert "take fewer slots or a smaller context" in " ".join(result.stderr.split())


def test_limits_are_settable(app_of: App) -> None:
    limits = Limits(choices=2, stops=1, stop_length=3, logprobs=1, body=2000)
    client = app_of(limits=limits)
    for extra in (
        {"n": 3},
        {"stop": ["a", "b"]},
        {"stop": "abcd"},
        {"logprobs": 2},
        {"prompt": ["a", "b", "c"]},
    ):
        assert client.post("/v1/completions", json={**BODY, **extra}).status_code == 400, extra
    assert client.post("/v1/completions", json={**BODY, "prompt": "x" * 3000}).status_code == 413


def test_the_log_has_every_request_that_is_refused(app_of: App, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLog(str(path), with_prompts=False)
    client = app_of(log=log, keys=["k"], limits=Limits(body=500))
    headers = {"Authorization": "Bearer k"}
    asked: list[tuple[dict[str, Any], int, str]] = [
        ({**BODY, "n": 99}, 400, "n: "),
        ({**BODY, "model": "other"}, 404, "not served"),
        ({**BODY, "prompt": "x" * 600}, 413, "bytes"),
        ({**BODY, "prompt": [10**6]}, 400, "vocabulary"),
    ]
    for body, status, _ in asked:
        answer = client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == status
    assert client.post("/v1/completions", json=BODY).status_code == 401
    assert client.get("/nowhere", headers=headers).status_code == 404
    answer = client.get("/v1/models", headers=headers)
    assert answer.headers["x-request-id"]
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["status"] for line in lines] == [*(status for _, status, _ in asked), 401, 404]
    for line, (_, _, words) in zip(lines, asked, strict=False):
        assert words in line["error"]
        assert line["route"] == "/v1/completions" and line["method"] == "POST"
    assert len({line["request"] for line in lines}) == len(lines)
    text = client.get("/metrics", headers=headers).text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="400"} 2.0' in text
    assert 'http_requests_total{handler="none",method="POST",status="413"} 1.0' in text


def test_the_log_knows_who_left(endless: Path, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    server = Server(endless, "--log-json", str(path))
    body = {"model": "long", "prompt": "ab", "max_tokens": 50_000, "seed": 1}
    with httpx.stream("POST", f"{server.url}/completions", json={**body, "stream": True}) as got:
        next(got.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/completions", json=body, timeout=1)
    while server.status()["running"]:
        time.sleep(0.05)
    server.stop()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["status"] for line in lines] == [499, 499]
    assert {line["error"] for line in lines} == {"the client left"}
    assert all(line["completion_tokens"] > 0 for line in lines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_stops_nothing(app_of: App) -> None:
    log = RequestLog("/dev/full", with_prompts=False)
    client = app_of(log=log)
    for _ in range(3):
        assert client.post("/v1/completions", json=BODY).status_code == 200
    log.close()
    assert log.dropped == 3
    assert 'qexport:log_lines_dropped{model_name="m"} 3.0' in client.get("/metrics").text


def test_a_pipe_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = RequestLog(str(pipe), with_prompts=False)
    begin = time.monotonic()
    for _ in range(10_000):
        log.write({"x": "y" * 1000})
    assert time.monotonic() - begin < 5
    assert log.dropped > 0
    os.close(reader)  # what was about to be written fails, and the thread goes on
    log.close()


def test_a_token_that_is_not_there_is_not_ignored(app_of: App) -> None:
    answer = app_of().post("/v1/completions", json={**BODY, "logit_bias": {"999999": 1}})
    assert answer.status_code == 400
    assert "999999" in answer.json()["error"]["message"]


def test_a_text_that_cannot_fit_is_refused_unseen(app_of: App) -> None:
    client = app_of()
    begin = time.monotonic()
    for body, path in (
        ({**BODY, "prompt": "word " * 700_000}, "/v1/completions"),
        ({"model": "m", "prompt": "word " * 700_000}, "/tokenize"),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert time.monotonic() - begin < 2


def test_echo_is_what_was_given(app_of: App) -> None:
    """Not what its tokens come to: a beginning of text is nobody's own."""
    client = app_of()
    for prompt in ("ab", " a  b\n", "<|im_start|>x"):
        answer = client.post("/v1/completions", json={**BODY, "prompt": prompt, "echo": True})
        assert answer.json()["choices"][0]["text"].startswith(prompt)
    body = {**BODY, "prompt": ["ab", "cd"], "n": 2, "echo": True}
    texts = [
        choice["text"][:2] for choice in client.post("/v1/completions", json=body).json()["choices"]
    ]
    assert texts == ["ab", "ab", "cd", "cd"]


def test_usage_of_several_answers(app_of: App) -> None:
    """A prompt counts once, however many answers it has."""
    body = {**BODY, "prompt": "a long beginning", "n": 2}
    client = app_of()
    for _ in range(2):
        usage = client.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == 16
    assert usage["prompt_tokens_details"]["cached_tokens"] == 15
    assert usage["completion_tokens"] == 6


def test_a_fault_of_ours_is_logged_as_one(
    app_of: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLog(str(path), with_prompts=False)
    app = app_of(log=log).app

    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("qexport.runtime.server.service.Service.admit", fails)
    client = TestClient(app, raise_server_exceptions=False)
    answer = client.post("/v1/completions", json=BODY)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "internal error."
    log.close()
    line = json.loads(path.read_text())
    assert (line["status"], line["error"]) == (500, "internal error")


def test_prompts_are_not_added_to_a_log_that_others_may_read(app_of: App, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for with_prompts, mode in ((False, 0o644), (True, 0o600)):
        log = RequestLog(str(path), with_prompts)
        with app_of(log=log) as client:
            assert client.post("/v1/completions", json=BODY).status_code == 200
        log.close()
        assert path.stat().st_mode & 0o777 == mode
    assert "ab" in path.read_text().splitlines()[-1]
