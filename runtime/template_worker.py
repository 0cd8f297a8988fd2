"""The process that renders chat templates: a checkpoint's own code, with little memory and time.

`python -m qexport.runtime.template_worker BYTES SECONDS` says on stdout that it is ready, reads
lines of JSON on stdin, {"template", "messages", ...}, and answers each with one, {"text"} or
{"error"}. Whoever asks kills it when it takes too long.
"""

import json
import signal
import sys
from contextlib import suppress
from typing import Any

__all__ = ["main"]


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    used = 0
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))


def _alarm(seconds: int) -> None:
    """End by itself, if whoever asked is no longer there to do it."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, template = request.pop("messages"), request.pop("template")
    try:
        texts, _ = render_jinja_template([messages], chat_template=template, **request)
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # the template's own code: it may raise anything
        return {"error": str(error)[:500] or type(error).__name__}
    return {"text": texts[0]}


def main() -> None:
    """Answer until stdin ends."""
    from transformers.utils import chat_template_utils  # noqa: F401  # before memory is limited

    with suppress(OSError):  # no /proc
        _limit_memory(int(sys.argv[1]))
    sys.stdout.write("{}\n")  # ready
    sys.stdout.flush()
    seconds = int(sys.argv[2])
    for line in sys.stdin:
        _alarm(seconds)
        answer = _answer(json.loads(line))
        _alarm(0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
