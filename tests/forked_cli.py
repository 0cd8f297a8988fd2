"""The command line in a process of its own, forked from one that has imported what is heavy.

Every call is a process with its own exit code, files and memory, as a user's is; only the seconds
of importing torch and transformers are spared. `multiprocessing`'s fork server runs no threads.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

__all__ = ["Started", "call", "script"]

_PRELOADED = [
    *("torch", "transformers", "safetensors.torch", "datasets", "accelerate", "rich.progress"),
    *("torch.utils.tensorboard", "transformers.models.llama.modeling_llama"),
    *("qexport.training", "qexport.evaluate", "qexport.formats.pack", "qexport.formats.verify"),
    *("qexport.quantization", "qexport.runtime.serving", "qexport.runtime.server", "uvicorn"),
]
_SECONDS = 300
_FILES = ("in", "out", "err")


class Started:
    """`qexport` with these arguments, while it runs: what of `subprocess.Popen` tests ask for.

    stderr   what it says there
    """

    def __init__(
        self, arguments: list[str], cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in _FILES]
            files[0].touch()
            os.mkfifo(files[2])
            self._process = _begin(_command, arguments, cwd, files, env or {})
            self.stderr = files[2].open()  # when the process has opened it, the last of three

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, kind: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, kind)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = _SECONDS) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("qexport", timeout)
        return code

    def said(self, timeout: float = _SECONDS) -> str:
        """What it has said at its end, which comes within `timeout`, or it is killed."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        with self.stderr:
            said = self.stderr.read()
        timer.cancel()
        self.wait()
        return said


def call(
    arguments: list[str],
    cwd: Path | None = None,
    stdin: str | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `qexport` with these arguments; what `subprocess.run` would give."""
    return _finished(_command, arguments, cwd, stdin, env)


def script(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same of Python's source."""
    return _finished(_source, [code], cwd, None, None)


def _finished(
    what: Callable[[list[str]], None],
    arguments: list[str],
    cwd: Path | None,
    stdin: str | None,
    env: dict[str, str] | None,
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in _FILES]
        files[0].write_text(stdin or "")
        process = _begin(what, arguments, cwd, files, env or {})
        process.join(_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, _SECONDS)
        out, err = (file.read_text() for file in files[1:])
        code = process.exitcode
        process.close()
    assert code is not None
    return subprocess.CompletedProcess(arguments, code, out, err)


def _begin(
    what: Callable[[list[str]], None],
    arguments: list[str],
    cwd: Path | None,
    files: list[Path],
    env: dict[str, str],
) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    where, paths = str(cwd or Path.cwd()), list(map(str, files))
    given = (what, arguments, where, {**os.environ, **env}, paths)
    process = context.Process(target=_run, args=given, daemon=True)  # ends when the tests do
    process.start()
    return process


def _run(
    what: Callable[[list[str]], None],
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    files: list[str],
) -> None:
    """In the child: a user's standard files, signals, folder and environment, and then `what`."""
    for number, (file, flags) in enumerate(
        zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)
    ):
        descriptor = os.open(file, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the fork server ignores
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    what(arguments)


def _command(arguments: list[str]) -> None:
    sys.argv = ["qexport", *arguments]
    from qexport.cli import main

    main()


def _source(arguments: list[str]) -> None:
    (code,) = arguments
    sys.argv = ["-c"]
    sys.path.insert(0, "")
    warnings.simplefilter("ignore", DeprecationWarning)
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
