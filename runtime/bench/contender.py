"""A contender of a benchmark: an engine and a checkpoint, in a worker process of its own."""

import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qexport.errors import InputError, QexportError, UnsupportedError
from qexport.runtime.bench.backends import Answers, Options, gguf_file, llama_server
from qexport.runtime.bench.processes import family_seconds
from qexport.runtime.bench.worker import BACKENDS

__all__ = ["Contender", "Running", "parse_contender"]

_EXIT_SECONDS = 30
_HAS_VLLM = "import importlib.util as u; assert all(map(u.find_spec, ('vllm', 'qexport')))"
_ERRORS: dict[int, type[QexportError]] = {2: InputError, 4: UnsupportedError}


@dataclass(frozen=True)
class Contender:
    """A backend's name and what it loads."""

    backend: str
    path: Path

    @property
    def name(self) -> str:
        """For people: `native packed`."""
        return f"{self.backend} {self.path.name or self.path}"

    def check(self, options: Options, python: str | None) -> None:
        """Raise UnsupportedError where its engine is not here, InputError where it reads no path.

        python   that has vLLM; None: this one
        """
        if self.backend == "llama.cpp":
            llama_server(options)
            gguf_file(self.path)
        if self.backend == "vllm":
            _check_vllm(python or sys.executable)


def parse_contender(text: str, default: Path) -> Contender:
    """`vllm` or `vllm=FOLDER`. Raises InputError for another backend."""
    backend, _, path = text.partition("=")
    if backend not in BACKENDS:
        raise InputError(f"there is no backend {backend}; there are {', '.join(BACKENDS)}.")
    found = Path(path) if path else default
    if not found.exists():
        raise InputError(f"{found} does not exist; give {backend}=FOLDER.")
    return Contender(backend, found)


def _check_vllm(python: str) -> None:
    try:
        subprocess.run([python, "-c", _HAS_VLLM], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnsupportedError(
            f"{python} has not both vllm and qexport; name a Python that has, by --vllm-python."
        ) from error


class Running:
    """A contender that is loaded. Raises what its engine says where that fails.

    python   that has vLLM; None: this one
    """

    def __init__(self, contender: Contender, options: Options, python: str | None = None) -> None:
        self.contender = contender
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the worker runs
        other = python if contender.backend == "vllm" else None
        self._process = subprocess.Popen(
            [
                *(other or sys.executable, "-m", "qexport.runtime.bench.worker"),
                *(contender.backend, str(contender.path), json.dumps(asdict(options))),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            about = self._read()
        except BaseException:
            self.close()
            raise
        self.pid = self._process.pid
        self.load_seconds: float = about["load_seconds"]
        self.kernel: str = about["kernel"]
        self.version: str = about["version"]

    def run(self, prompts: list[list[int]], tokens: int) -> Answers:
        """One batch. Raises QexportError where the engine fails."""
        found = self._ask({"prompts": prompts, "tokens": tokens})
        return Answers(found["tokens"], found["times"])

    def peaks(self) -> tuple[int, int]:
        """The most bytes held in memory and on a GPU; zeros where it has ended before."""
        try:
            found = self._ask({"prompts": None})
        except QexportError:
            return 0, 0
        return found["peak"], found["device"]

    def cpu_seconds(self) -> float:
        """That its processes have run for so far."""
        return family_seconds(self.pid)

    def _ask(self, value: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise QexportError(f"{self.contender.name} has ended: {self._said()}") from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise QexportError(f"{self.contender.name} has ended: {self._said()}")
        value: dict[str, Any] = json.loads(line)
        if "error" in value:
            kind = _ERRORS.get(value.get("exit_code", 1), QexportError)
            raise kind(f"{self.contender.name}: {value['error']}")
        return value

    def _said(self) -> str:
        self._process.wait(_EXIT_SECONDS)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return (lines or ["it said nothing"])[-1][:500]

    def close(self) -> None:
        """End the worker."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # it has ended before it read all
                    pipe.close()
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
