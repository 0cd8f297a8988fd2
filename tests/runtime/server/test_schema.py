"""schemathesis against our own OpenAPI document: valid requests, and all kinds of wrong ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from schemathesis.core.result import Err

from qexport.runtime.server import Limits, create_app
from qexport.runtime.serving import Serving, open_generator
from qexport.tiny import write_tiny_model


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    folder = write_tiny_model(tmp_path_factory.mktemp("schema") / "tiny")
    with open_generator(folder, Serving(slots=4)) as generator:
        yield create_app(generator, "tiny", limits=Limits(receive_seconds=5))


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_breaks_it(app: FastAPI, mode: GenerationMode) -> None:
    """No status that is not documented, no 5xx, bodies of the documented form."""
    # what no schema can say (vocabulary, context, template, fields that exclude each other) is 400
    accepted = {"expected-statuses": ["2xx", "400", "404", "429"]}
    config = SchemathesisConfig.from_dict({"checks": {"positive_data_acceptance": accepted}})
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config)
    seen = set()
    for result in schema.get_all_operations():
        assert not isinstance(result, Err)
        operation = result.ok()
        seen.add(operation.path)
        try:
            strategy = operation.as_strategy(generation_mode=mode)
        except Unsatisfiable:  # nothing about it can be wrong
            continue
        check(strategy)
    assert len(seen) > 10


def check(cases: Any) -> None:
    @given(case=cases)
    @settings(
        max_examples=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and case.body.get("model"):
            case.body["model"] = "tiny"  # else every request ends at its first check
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n"):
                if type(case.body.get(name)) is int and case.body[name] > 4:
                    case.body[name] = 4
        case.call_and_validate()

    try:
        run()
    except Unsatisfiable:  # nothing about it can be wrong
        return


def test_errors_are_documented(app: FastAPI) -> None:
    document = app.openapi()
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"):
        responses = document["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "413", "429", "503"} <= set(responses)
        assert "422" not in responses


def test_the_document_is_guarded_too(tmp_path: Path, app: FastAPI) -> None:
    from fastapi.testclient import TestClient

    generator = app.state.service.generator
    guarded = TestClient(create_app(generator, "tiny", keys=["k"]))
    for route in app.routes:
        path = getattr(route, "path", "").replace("{name:path}", "tiny")
        answer = guarded.get(path)
        assert answer.status_code == (200 if path == "/health" else 401), path
