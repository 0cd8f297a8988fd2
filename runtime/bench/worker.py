"""One engine in a process of its own: `python -m qexport.runtime.bench.worker`.

A line of JSON comes in and one goes out. What libraries print goes to stderr.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from qexport.errors import QexportError
from qexport.runtime.bench.backends import Backend, LlamaServer, Native, Options, Transformers

__all__ = ["BACKENDS", "main"]

BACKENDS = ("native", "vllm", "llama.cpp", "transformers")


def open_backend(name: str, path: Path, options: Options) -> Backend:
    """Load a model into an engine."""
    if name == "vllm":
        from qexport.runtime.vllm_plugin.timing import VllmEngine

        return VllmEngine(path, options)
    if name == "llama.cpp":
        return LlamaServer(path, options)
    return (Native if name == "native" else Transformers)(path, options)


def main() -> None:
    """Answer until standard input ends."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like
    name, path, options = sys.argv[1:]
    start = time.monotonic()
    try:
        backend = open_backend(name, Path(path), Options(**json.loads(options)))
    except QexportError as error:
        _say(said, {"error": str(error), "exit_code": error.exit_code})
        return
    except Exception as error:  # of another project's engine
        _say(said, {"error": f"{type(error).__name__}: {error}", "exit_code": 1})
        raise
    seconds = time.monotonic() - start
    about = {"load_seconds": seconds, "kernel": backend.kernel, "version": backend.version}
    _say(said, about)
    try:
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["prompts"] is None:
                _say(said, {"peak": backend.peak_bytes(), "device": backend.device_bytes()})
                continue
            try:
                answers = backend.run(asked["prompts"], asked["tokens"])
            except QexportError as error:
                _say(said, {"error": str(error)})
                continue
            except Exception as error:  # told, and the next one may go well
                _say(said, {"error": f"{type(error).__name__}: {error}"})
                continue
            _say(said, {"tokens": answers.tokens, "times": answers.times})
    finally:
        backend.close()


def _say(said: TextIO, value: dict[str, Any]) -> None:
    said.write(json.dumps(value) + "\n")
    said.flush()


if __name__ == "__main__":
    main()
