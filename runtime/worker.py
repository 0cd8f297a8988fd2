"""A process for work that somebody else may have made endless: killed when it takes too long.

Both sides stand here. The parent writes a line of JSON for each piece of work and reads one back;
the process limits its own memory, says that it is ready, and answers line by line until its stdin
ends.
"""

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

__all__ = ["Worker", "answer_lines"]

_START = 60.0  # to import what is wanted, on a machine that has other work
_LARGEST = 16 << 20  # bytes of an answer


class Worker:
    """Asks one process, started when it is first wanted, and again after it was killed.

    For several threads, which take turns.

    module     run by `python -m` with memory, seconds and `arguments`; calls `answer_lines`
    seconds    that an answer may take
    memory     bytes that the process may take beside what it holds when it begins to answer
    """

    def __init__(self, module: str, seconds: float, memory: int, *arguments: str) -> None:
        limits = str(memory), str(math.ceil(seconds) + 1)
        self._command = [sys.executable, "-m", module, *limits, *arguments]
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False

    def ask(self, work: dict[str, Any]) -> dict[str, Any]:
        """What the process answers, or {"error"} where it took too long or has ended."""
        line = json.dumps(work).encode() + b"\n"
        with self._lock:
            return self._ask(line)

    def start(self) -> None:
        """Start the process before it is wanted."""
        with self._lock:
            self._started()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._kill()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._kill()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for its parent
            )
            self._ready = False
        return self._process

    def _ask(self, line: bytes) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            if not self._ready:
                _line(process.stdout, _START)
                self._ready = True
            process.stdin.write(line)
            process.stdin.flush()
            answer = _line(process.stdout, self._seconds)
        except (OSError, TimeoutError, ValueError) as error:
            self._kill()
            why = "it takes too long" if isinstance(error, TimeoutError) else "its process ended"
            return {"error": why}
        found: dict[str, Any] = json.loads(answer)
        return found

    def _kill(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._process = None


def _line(pipe: IO[bytes], seconds: float) -> bytes:
    """A line of a pipe. Raises TimeoutError, and ValueError where it ends or is too long."""
    end, found = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not found.endswith(b"\n"):
            if not selector.select(max(0.0, end - time.monotonic())):
                raise TimeoutError
            part = os.read(pipe.fileno(), 1 << 16)
            found += part
            if not part or len(found) > _LARGEST:
                raise ValueError
    return found


def answer_lines(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The process's side: answer until stdin ends. Limits are the first two arguments."""
    with suppress(OSError):  # no /proc
        _limit_memory(int(sys.argv[1]))
    sys.stdout.write("{}\n")  # ready
    sys.stdout.flush()
    seconds = int(sys.argv[2])
    for line in sys.stdin:
        _alarm(seconds)
        made = answer(json.loads(line))
        _alarm(0)
        sys.stdout.write(json.dumps(made) + "\n")
        sys.stdout.flush()


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))


def _alarm(seconds: int) -> None:
    """End by itself, if whoever asked is no longer there to do it."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)
