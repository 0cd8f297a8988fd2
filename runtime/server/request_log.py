"""A line of JSON for each request, written by a thread of its own."""

import json
import os
import queue
import stat
import threading
from typing import IO, Any

__all__ = ["RequestLog"]

_MOST_LINES = 4096  # that wait to be written
_LAST_SECONDS = 2.0  # for what waits at the end


class RequestLog:
    """Lines to a file, or to stderr (`-`); prompts only where asked.

    A full disk or a pipe that nobody reads holds nothing up: lines are dropped, and counted.
    """

    def __init__(self, path: str, with_prompts: bool) -> None:
        self.with_prompts = with_prompts
        self.dropped = 0
        self._file: IO[bytes]
        if path == "-":
            self._file = os.fdopen(os.dup(2), "wb", buffering=0)
        else:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            mode = 0o600 if with_prompts else 0o644  # what people asked is not for every user
            self._file = os.fdopen(os.open(path, flags, mode), "ab", buffering=0)
            status = os.fstat(self._file.fileno())
            if with_prompts and stat.S_ISREG(status.st_mode):  # it may have been there before
                os.fchmod(self._file.fileno(), status.st_mode & 0o600)
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MOST_LINES)
        self._torn = False
        self._thread = threading.Thread(target=self._run, name="qexport-log", daemon=True)
        self._thread.start()

    def write(self, line: dict[str, Any]) -> None:
        """Have one line written."""
        try:
            self._lines.put_nowait(json.dumps(line).encode() + b"\n")
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits, as far as that goes."""
        try:
            self._lines.put(None, timeout=_LAST_SECONDS)
        except queue.Full:
            return
        self._thread.join(_LAST_SECONDS)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(line)
        self._file.close()

    def _write(self, line: bytes) -> None:
        if self._torn:  # the end of a line did not fit: the next one begins anew
            line = b"\n" + line
        try:
            written = self._file.write(line)
        except OSError:
            written = 0
        self._torn = 0 < written < len(line)
        self.dropped += written < len(line)
