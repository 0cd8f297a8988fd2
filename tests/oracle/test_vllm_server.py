"""`qexport serve --backend vllm` with a real vLLM behind it."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from benchmarks.decode import rounded
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.tiny import write_tiny_model
from tests.oracle.install import FOLDER
from tests.oracle.marks import REAL_MODELS

pytestmark = REAL_MODELS
KEY = "s3cret"


class Served:
    """The process, and what it has said."""

    def __init__(self, path: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [str(FOLDER / "bin" / "python"), "-m", "qexport", "serve", str(path)]
        command += ["--backend", "vllm", "--port", str(self.port), "--served-model-name", "m"]
        command += ["--dtype", "float32", "--vllm-arg=--enforce-eager"]
        env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "QEXPORT_SERVE_API_KEY": KEY}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait(self) -> None:
        end = time.monotonic() + 300
        while not any(line.startswith("serving m at") for line in self.lines):
            assert self.process.poll() is None and time.monotonic() < end, self.log[-4000:]
            time.sleep(0.2)

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self) -> int:
        code = self.process.wait(timeout=90)
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@contextmanager
def serving(path: Path) -> Iterator[Served]:
    served = Served(path)
    try:
        served.wait()
        yield served
    finally:
        if served.process.poll() is None:
            served.process.terminate()
            served.end()


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose heads vLLM's attention on CPUs takes."""
    folder = tmp_path_factory.mktemp("vllm")
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    model = write_tiny_model(folder / "model", **shape)
    pack(rounded(open_checkpoint(model), "int4", 32), FORMATS["native"], folder / "native")
    return folder / "native"


def test_it_answers_and_ends_when_it_is_asked(native: Path) -> None:
    with serving(native) as served:
        root = f"http://127.0.0.1:{served.port}"
        client = openai.OpenAI(base_url=f"{root}/v1", api_key=KEY)
        assert [model.id for model in client.models.list()] == ["m"]
        made = client.completions.create(model="m", prompt="ab", max_tokens=5, temperature=0)
        assert made.usage is not None and made.usage.completion_tokens > 0
        assert httpx.get(f"{root}/health").status_code == 200
        assert "vllm:num_requests_running" in httpx.get(f"{root}/metrics").text
        assert httpx.get(f"{root}/v1/models").status_code == 401
        assert "modules int4" in served.log  # what the check before said
        workers = served.children()
        cmdline = Path(f"/proc/{workers[0]}/cmdline").read_text()
        assert "--served-model-name" in cmdline and KEY not in cmdline
        served.process.send_signal(signal.SIGTERM)
        assert served.end() == 0, served.log[-3000:]
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_killed_vllm_is_told_in_one_sentence(native: Path) -> None:
    with serving(native) as served:
        (child,) = served.children()
        os.kill(child, signal.SIGKILL)
        assert served.end() == 1
    last = served.lines[-1]
    assert last.startswith("Error: vLLM has ended: it was killed (SIGKILL)"), served.log[-2000:]
    assert "Traceback" not in "".join(served.lines[-3:])
