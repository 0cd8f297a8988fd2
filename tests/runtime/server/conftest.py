"""A server in a process of its own, as users start it."""

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.tiny import write_tiny_model
from tests.conftest import Runs
from tests.forked_cli import Started


class Server:
    """`qexport serve`, from its first line on stderr to its end."""

    def __init__(self, path: Path, *options: str, env: dict[str, str] | None = None) -> None:
        self.process = Started(["serve", str(path), "--port", "0", *options], env=env)
        line = self.process.stderr.readline()
        assert line.startswith("serving "), line
        _, self.model, _, self.url = line.split()
        self.root = self.url.removesuffix("/v1")
        self.port = int(self.root.rpartition(":")[2])
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        self.errors.extend(self.process.stderr)

    @property
    def log(self) -> str:
        return "".join(self.errors)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **options.pop("headers", {})}
        url = f"{self.root}{path}"
        return httpx.post(url, content=content, headers=headers, timeout=60, **options)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.root}/status", timeout=10).json()
        return found

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(timeout=60)
        self._reader.join(timeout=5)
        self.process.stderr.close()
        return code


@pytest.fixture(scope="session")
def packed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "tiny-4bit"
    pack(open_checkpoint(runs("4")), FORMATS["gptq"], out)
    return out


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that goes on until max_tokens, in a context of 200,000."""
    folder = tmp_path_factory.mktemp("endless") / "long"
    model = write_tiny_model(folder, max_position_embeddings=200_000, eos_token_id=None)
    path = model / "tokenizer_config.json"
    described = json.loads(path.read_text())
    described.pop("eos_token")
    path.write_text(json.dumps(described))
    return model


@pytest.fixture(scope="package")
def server(packed: Path) -> Iterator[Server]:
    running = Server(packed)
    yield running
    running.stop()
    assert "Traceback" not in running.log


@pytest.fixture(scope="package")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
