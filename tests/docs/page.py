"""Code blocks of a page, and running them as a reader would: in order, in one folder.

Before a block may stand `<!-- file: NAME -->` (its text is that file), `<!-- not run: WHY -->`,
`<!-- folders: NAMES -->` (what the reader has: `run`, `packed`, `train.jsonl`), or
`<!-- fails: EXIT CODE -->`, and then the `text` block that follows it is what it prints. Others
are run if they are of RUN, and have to be of PARSED otherwise.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.forked_cli import Started, script

__all__ = ["Block", "Reader", "blocks"]

RUN = ("console", "python")
PARSED: dict[str, Callable[[str], Any]] = {
    "yaml": yaml.safe_load,
    "json": json.loads,
    "ini": lambda text: ConfigParser(interpolation=None, strict=False).read_string(text),
    "text": str,
}
_FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>[a-z ]+): (?P<value>[^\n]*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
_SHELL = set("|&;<>$`")
_SECONDS = 300


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what the comment before it says."""

    language: str
    code: str
    mark: str = ""
    value: str = ""


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    for match in _FENCE.finditer(text):
        code = textwrap.dedent(match["code"])
        yield Block(match["language"], code, match["mark"] or "", match["value"] or "")


class Reader:
    """Who types a page's blocks in a folder. Leaving it stops the servers that were started."""

    def __init__(self, folder: Path, before: Path, qexport: Callable[..., Any]) -> None:
        self._folder, self._before, self._qexport = folder, before, qexport
        self._said = ""  # by the last command that failed as it should
        self._servers: list[Started] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = str(free.getsockname()[1])

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.send_signal(signal.SIGTERM)
        for server in self._servers:
            server.said(timeout=60)

    def take(self, block: Block) -> None:
        """Do what a block and the comment before it ask for. Raises AssertionError."""
        if block.mark == "not run":
            assert len(block.value.split()) > 2, f"say why this is not run:\n{block.code}"
        elif block.mark == "file":
            (self._folder / block.value).write_text(block.code)
        elif block.language in RUN:
            for name in block.value.split() if block.mark == "folders" else ():
                self._copy(name)
            code, printed = self._do(block)
            wanted = int(block.value) if block.mark == "fails" else 0
            assert code == wanted, f"{block.code}\n{printed[-3000:]}"
            self._said = " ".join(printed.split()) if wanted else ""
        elif self._said:
            at = 0
            for part in block.code.split("…"):  # stands for what depends on the model
                said = " ".join(part.split())
                assert said in self._said[at:], self._said
                at = self._said.index(said, at) + len(said)
            self._said = ""
        else:
            assert block.language in PARSED, f"a block of {block.language!r}:\n{block.code}"
            PARSED[block.language](block.code)

    def _copy(self, name: str) -> None:
        path = self._before / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, self._folder / name)

    def _do(self, block: Block) -> tuple[int, str]:
        """The exit code of a block, and what it printed; of a list of commands the last one's."""
        code = block.code.replace("8000", self._port)
        if block.language == "python":
            made = script(code, self._folder)
            return made.returncode, made.stdout + made.stderr
        found = (0, "")
        for line in _commands(code):
            found = self._command(line)
            if found[0]:
                break
        return found

    def _command(self, line: str) -> tuple[int, str]:
        words = shlex.split(line, comments=True)
        if words[:2] == ["qexport", "serve"] and "--help" not in words:
            return self._serve(words[1:])
        if words[:1] == ["qexport"] and not _SHELL & set(line):
            made = self._qexport(*words[1:], cwd=self._folder)
            return made.returncode, made.stdout + made.stderr
        return self._process(["bash", "-euo", "pipefail", "-c", line])

    def _process(self, words: list[str]) -> tuple[int, str]:
        made = subprocess.run(
            words,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        return made.returncode, made.stdout + made.stderr

    def _serve(self, words: list[str]) -> tuple[int, str]:
        """Start a server, and wait until it answers or ends."""
        port = () if "--port" in words else ("--port", self._port)
        server = Started([*words, *port], self._folder)
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end and server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5).close()
            except OSError:
                time.sleep(0.2)
                continue
            self._servers.append(server)
            return 0, ""
        server.kill()
        said = server.said()
        return server.wait() or 1, said


def _commands(code: str) -> Iterator[str]:
    """Commands of a block, lines that go on put together."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()
