"""Engines that answer a batch of prompts token by token, and when each token came.

Each runs in a process of its own (`worker`), loaded once, and answers when it is its turn.
"""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.errors import InputError, QexportError, UnsupportedError
from qexport.runtime.child import NOT_YET, end_with_parent, open_local
from qexport.version import __version__

__all__ = [
    "Answers",
    "Backend",
    "LlamaServer",
    "Native",
    "Options",
    "Transformers",
    "gguf_file",
    "llama_server",
    "note_event",
]

_START_SECONDS = 300.0


@dataclass(frozen=True)
class Options:
    """What engines are told, as far as they know it.

    slots    largest batch; context: tokens of each sequence
    serving  of the native engine: kernel, head_bits, cache, dtype
    llama    llama.cpp's server; None: the one on the path
    """

    slots: int
    context: int
    threads: int | None
    serving: dict[str, Any]
    llama: str | None = None


@dataclass
class Answers:
    """Of each sequence: tokens, and seconds from the batch's beginning at which each came."""

    tokens: list[list[int]]
    times: list[list[float]]


class Backend(ABC):
    """An engine with a model loaded.

    kernel  what multiplies; version: of the engine, both for people
    """

    kernel: str
    version: str

    @abstractmethod
    def run(self, prompts: list[list[int]], tokens: int) -> Answers:
        """Greedily `tokens` more for every prompt, all at a time, whatever token comes."""

    def peak_bytes(self) -> int:
        """The most memory that the process has held."""
        return _peak(os.getpid())

    def device_bytes(self) -> int:
        """The most that was held on a GPU."""
        import torch

        return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0

    def close(self) -> None:  # noqa: B027  # nothing, for most
        """End what runs."""


class Native(Backend):
    """Our generator."""

    def __init__(self, path: Path, options: Options) -> None:
        from qexport.runtime.serving import Serving, open_generator

        serving = Serving(
            **options.serving,
            slots=options.slots,
            context=options.context,
            threads=options.threads,
        )
        self._generator = open_generator(path, serving, waiting=options.slots)
        self.kernel, self.version = self._generator.decoder.kernels, __version__

    def run(self, prompts: list[list[int]], tokens: int) -> Answers:
        from qexport.runtime.sampler import Sampling

        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_end=True)
        start = time.monotonic()
        tickets = [self._generator.stream(prompt, sampling) for prompt in prompts]
        found = Answers([], [])
        for ticket in tickets:
            pieces = list(ticket)
            found.tokens.append([piece.token for piece in pieces if piece.token is not None])
            found.times.append([piece.made - start for piece in pieces])
        return found

    def close(self) -> None:
        self._generator.close()


class Transformers(Backend):
    """transformers' modelling over dequantized weights: one forward call a step."""

    def __init__(self, path: Path, options: Options) -> None:
        import torch
        import transformers

        from qexport.grid import dtype_name
        from qexport.runtime.loader import open_model

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._model, _, _ = open_model(path, options.serving.get("dtype", "auto"))
        self.kernel = f"torch, dense {dtype_name(self._model.dtype)}"
        self.version = transformers.__version__

    def run(self, prompts: list[list[int]], tokens: int) -> Answers:
        import torch

        ids = torch.tensor(prompts, device=self._model.device)
        cache: Any = None
        found: list[list[int]] = []
        times: list[float] = []
        start = time.monotonic()
        with torch.inference_mode():
            for _ in range(tokens):
                made = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = made.past_key_values
                ids = made.logits[:, -1].argmax(-1, keepdim=True)
                found.append(ids[:, 0].tolist())  # waits for a GPU
                times.append(time.monotonic() - start)
        return Answers([list(row) for row in zip(*found, strict=True)], [times] * len(prompts))


def llama_server(options: Options) -> str:
    """The program. Raises UnsupportedError where it is not there."""
    found = shutil.which(options.llama or "llama-server")
    if found is None:
        where = "is not on the path" if options.llama is None else f"is not {options.llama}"
        raise UnsupportedError(f"llama.cpp's server {where}; name it with --llama-server.")
    return found


def gguf_file(path: Path) -> Path:
    """Itself, or the first one of a folder. Raises InputError where there is none."""
    found = next(iter(sorted(path.glob("*.gguf"))), None) if path.is_dir() else path
    if found is None or found.suffix != ".gguf":
        raise InputError(f"{path} holds no GGUF file; `qexport pack --format gguf` makes one.")
    return found


class LlamaServer(Backend):
    """llama.cpp's own server over a GGUF file, asked over HTTP on this machine."""

    def __init__(self, path: Path, options: Options) -> None:
        file, gguf = llama_server(options), gguf_file(path)
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}"
        command = [file, "-m", str(gguf), "--port", str(port), "--host", "127.0.0.1"]
        command += ["-np", str(options.slots), "-c", str(options.slots * options.context)]
        command += ["--no-webui"]
        if options.threads is not None:
            command += ["-t", str(options.threads)]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the server runs
        self._process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=self._log,
            preexec_fn=end_with_parent,  # noqa: PLW1509  # no threads of ours run yet
        )
        self._wait()
        self.kernel, self.version = f"llama.cpp, {_gguf_types(gguf)}", self._build()

    def _wait(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with open_local(f"{self._url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except NOT_YET:  # noqa: PERF203  # not yet
                time.sleep(0.2)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()[-3:]
        self.close()
        raise QexportError(f"llama-server did not start: {' '.join(said)[:500]}")

    def _build(self) -> str:
        with open_local(f"{self._url}/props", timeout=10) as answer:
            return str(json.load(answer).get("build_info", "of unknown version"))

    def run(self, prompts: list[list[int]], tokens: int) -> Answers:
        found = Answers([[] for _ in prompts], [[] for _ in prompts])
        start = time.monotonic()

        def ask(index: int) -> None:
            body = {
                **{"prompt": prompts[index], "n_predict": tokens, "stream": True},
                **{"temperature": 0, "ignore_eos": True, "cache_prompt": False},
                "return_tokens": True,
            }
            request = urllib.request.Request(
                f"{self._url}/completion",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with open_local(request, timeout=3600) as answer:
                for line in answer:
                    if line.startswith(b"data: "):
                        event = json.loads(line[6:])
                        note_event(found, index, event, time.monotonic() - start)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if any(len(made) != tokens for made in found.tokens):
            raise QexportError("llama-server ended an answer early.")
        return found

    def peak_bytes(self) -> int:
        return _peak(self._process.pid)

    def device_bytes(self) -> int:
        return 0  # it does not say

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


def note_event(found: Answers, index: int, event: dict[str, Any], now: float) -> None:
    """An event of llama-server's stream: the number of tokens so far, and the last one's id.

    Tokens that are parts of a character come without an event, and are not told: -1.
    """
    tokens, times = found.tokens[index], found.times[index]
    new = event.get("tokens", [])
    missing = max(len(new), event.get("tokens_predicted", 0) - len(times))
    times += [now] * missing
    tokens += [*[-1] * (missing - len(new)), *new]


def _gguf_types(file: Path) -> str:
    from qexport.formats import open_checkpoint

    held = {entry.stored for entry in open_checkpoint(file).entries.values() if entry.scheme}
    return "/".join(sorted(held)) or "dense"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _peak(pid: int) -> int:
    """The high-water mark of a process's resident memory; 0 where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0
