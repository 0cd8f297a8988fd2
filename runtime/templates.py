"""Chat templates, rendered in a process of their own that is killed when it takes too long.

A template is code of whoever made the checkpoint. transformers' sandbox keeps it from the machine,
but not from looping for hours or filling the memory.
"""

import json
import math
import os
import selectors
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import IO, Any

from qexport.errors import InputError

__all__ = ["TemplateWorker"]

_SECONDS = 5.0
_START = 60.0  # to import transformers, on a machine that has other work
_MEMORY = 512 << 20  # beside what the worker holds anyway
_LARGEST = 16 << 20  # bytes of an answer


class TemplateWorker:
    """Renders with one process, started when it is first wanted, and again after it was killed.

    For several threads, which take turns.
    """

    def __init__(self, seconds: float = _SECONDS, memory: int = _MEMORY) -> None:
        self._seconds, self._memory = seconds, memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False

    def render(self, template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The text of a conversation, ready for an answer.

        Raises InputError where the template refuses, or takes too much time or memory.
        """
        asked = {"template": template, "messages": messages, "add_generation_prompt": True}
        line = json.dumps({**variables, **asked}).encode() + b"\n"
        with self._lock:
            answer = self._ask(line)
        if "error" in answer:
            raise InputError(f"the chat template refuses these messages ({answer['error']}).")
        return str(answer["text"])

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
            limits = str(self._memory), str(math.ceil(self._seconds) + 1)
            command = [sys.executable, "-m", "qexport.runtime.template_worker", *limits]
            self._process = subprocess.Popen(
                command,
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
