"""Who may ask: keys, names, sites; and what is written down of it."""

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from qexport.runtime.server import Limits, RequestLog, create_app
from qexport.runtime.serving import Serving, open_generator
from tests.conftest import Cli, Runs
from tests.runtime.server.conftest import Server

BODY = {"model": "m", "prompt": "ab", "max_tokens": 3, "temperature": 0}


def app_of(model: Path, **options: Any) -> TestClient:
    generator = open_generator(model, Serving(slots=2))
    return TestClient(create_app(generator, "m", **options))


def test_any_of_several_keys(tiny_model: Path) -> None:
    client = app_of(tiny_model, keys=["one", "two"])
    basic = base64.b64encode(b"me:two").decode()
    good: list[dict[str, str]] = [
        {"Authorization": "Bearer one"},
        {"Authorization": "bearer two"},
        {"X-Api-Key": "two"},
        {"Authorization": f"Basic {basic}"},
        {"Authorization": f"Basic {basic}", "Sec-Fetch-Site": "same-origin"},
    ]
    bad: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer three"},
        {"Authorization": "Basic !!"},
        {"Authorization": "one"},
        # another site's page, whose request the browser signs for its user
        {"Authorization": f"Basic {basic}", "Sec-Fetch-Site": "cross-site"},
    ]
    for headers in good:
        assert client.get("/v1/models", headers=headers).status_code == 200, headers
    for headers in bad:
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == 401, headers
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_names_of_other_sites_are_refused(tiny_model: Path) -> None:
    """A name that was bound to 127.0.0.1 by somebody else's DNS is not ours."""
    client = app_of(tiny_model, hosts=["127.0.0.1", "localhost", "[::1]"])
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"):
        assert client.get("/version", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        assert client.get("/version", headers={"Host": host}).status_code == 421, host


def test_no_site_may_ask_unless_it_is_named(tiny_model: Path) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    closed = app_of(tiny_model).options("/v1/completions", headers=asked)
    assert "access-control-allow-origin" not in closed.headers
    opened = app_of(tiny_model, origins=["https://a.example"])
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
    keys.write_text("\n")
    for wrong in (("--api-key-file", keys), ("--api-key", ""), ("--limit", "queue=x")):
        result = cli("serve", runs("4"), *wrong)
        assert result.returncode == 2, wrong
        assert "Traceback" not in result.stderr
    result = cli("serve", runs("4"), "--limit", "speed=1")
    assert "there is no limit 'speed'; there are queue, body" in result.stderr


@pytest.mark.parametrize("with_prompts", [False, True])
def test_the_log_has_prompts_only_where_asked(
    tiny_model: Path, tmp_path: Path, with_prompts: bool
) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLog(str(path), with_prompts)
    client = app_of(tiny_model, log=log)
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


def test_metrics_count(tiny_model: Path) -> None:
    client = app_of(tiny_model)
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


def test_limits_are_settable(tiny_model: Path) -> None:
    limits = Limits(choices=2, stops=1, stop_length=3, logprobs=1, body=2000)
    client = app_of(tiny_model, limits=limits)
    for extra in (
        {"n": 3},
        {"stop": ["a", "b"]},
        {"stop": "abcd"},
        {"logprobs": 2},
        {"prompt": ["a", "b", "c"]},
    ):
        assert client.post("/v1/completions", json={**BODY, **extra}).status_code == 400, extra
    assert client.post("/v1/completions", json={**BODY, "prompt": "x" * 3000}).status_code == 413
