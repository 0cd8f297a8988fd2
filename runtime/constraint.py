"""Answers that follow a grammar: JSON, a JSON schema, a call of a tool (through llguidance).

A `Grammar` is checked once, off the engine's thread; each answer has a `Constraint` of its own,
which says what tokens may come next.
"""

import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import InputError, QexportError
from qexport.runtime.worker import Worker

__all__ = ["CALL_CLOSE", "CALL_OPEN", "Constraint", "Grammar", "Grammars", "check_schema"]

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"  # as Hermes, Qwen and SmolLM2 write them

_LARGEST_SCHEMA = 64 << 10  # bytes
_DEEPEST_SCHEMA = 64
_SECONDS, _MEMORY = 5.0, 1 << 30  # to compile a grammar
_KEPT = 32  # grammars
# as json.dumps writes it: where blanks are free, small models write nothing else to the end
_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_CALLS = """%llguidance {{}}
start: {start}
call: opening BLANK %json {schema} BLANK "</tool_call>"
opening[lazy]: TEXT "<tool_call>"
rest: TEXT
TEXT: /(.|\\n)*/
BLANK: /[ \\n]?/
"""
_EITHER = """%llguidance {{}}
start: call{many} | answer
call: {call}
answer: %json {answer}
BLANK: /[ \\n]?/
"""


class Grammar:
    """A grammar that was checked, over one tokenizer's tokens."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def constraint(self) -> "Constraint":
        """For one answer."""
        return Constraint(self._matcher.deep_copy())


class Constraint:
    """Which tokens may come next in one answer."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]:
        """bool [vocabulary]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        found = np.unpackbits(bits, bitorder="little")[:vocabulary].astype(bool)
        return np.pad(found, (0, vocabulary - len(found)))

    def accept(self, token: int) -> None:
        """Go on after `token`."""
        if not self._matcher.consume_token(token) and not self._matcher.is_stopped():
            raise QexportError(f"the grammar fails here: {self._matcher.get_error()[:200]}.")


class Grammars:
    """Makes grammars for a model's tokenizer (a fast one of transformers).

    Each is tried in a process of its own first; those that passed are kept, the latest of them.
    """

    def __init__(
        self, tokenizer: Any, vocabulary: int, end_tokens: frozenset[int], seconds: float = _SECONDS
    ) -> None:
        self._source, self._vocabulary, self._end = tokenizer, vocabulary, sorted(end_tokens)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._file: Any = None
        self._worker: Worker | None = None
        self._known: OrderedDict[str, Grammar] = OrderedDict()

    @property
    def tokenizer(self) -> Any:
        """llguidance's, made when it is first wanted: it takes a second."""
        with self._lock:
            if self._tokenizer is None:
                from llguidance.hf import from_tokenizer

                ends = self._end or None
                self._tokenizer = from_tokenizer(self._source, self._vocabulary, ends)
            return self._tokenizer

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
                self._file.close()
            self._worker = None

    def json_schema(self, schema: Any) -> Grammar:
        """Values of a JSON schema. Raises InputError where it is too large or not understood."""
        from llguidance import LLMatcher

        check_schema(schema)
        return self._made(lambda: LLMatcher.grammar_from_json_schema(schema, overrides=_FORM))

    def calls(self, schema: Any, parallel: bool) -> Grammar:
        """Free text, in which what stands between <tool_call> tags is a value of a schema.

        parallel: any number of calls; else the first one ends the answer.
        """
        check_schema(schema)
        start = "call* rest" if parallel else "call | rest"
        described = json.dumps({**schema, "x-guidance": _FORM})
        return self._made(lambda: _CALLS.format(start=start, schema=described))

    def calls_or(self, schema: Any, answer: Any, tagged: bool) -> Grammar:
        """Either calls, as in `calls` or bare, or a value of the schema `answer`."""
        check_schema(schema)
        check_schema(answer)
        one, other = (json.dumps({**part, "x-guidance": _FORM}) for part in (schema, answer))
        call = (
            f'"<tool_call>" BLANK %json {one} BLANK "</tool_call>" BLANK'
            if tagged
            else f"%json {one}"
        )
        return self._made(lambda: _EITHER.format(call=call, answer=other, many="+" * tagged))

    def _made(self, write: Callable[[], str]) -> Grammar:
        from llguidance import LLMatcher

        try:
            text = write()
        except ValueError as error:
            raise _refused(str(error)) from error
        if (known := self._known.get(text)) is not None:
            return known
        try:
            tokenizer = self.tokenizer
        except ValueError as error:  # not a fast one
            raise _refused(str(error)) from error
        answer = self._started().ask({"grammar": text})
        if answer:
            raise _refused(answer.get("wrong") or answer["error"])
        matcher = LLMatcher(tokenizer, text, log_level=0)
        matcher.compute_bitmask()
        made = self._known[text] = Grammar(matcher)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return made

    def _started(self) -> Worker:
        with self._lock:
            if self._worker is None:
                self._file = tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8")  # noqa: SIM115  # open as long as the process runs
                backend = copy(self._source.backend_tokenizer)
                backend.no_padding()
                backend.no_truncation()
                self._file.write(backend.to_str())
                self._file.flush()
                about = self._file.name, str(self._vocabulary), ",".join(map(str, self._end))
                module = "qexport.runtime.grammar_worker"
                self._worker = Worker(module, self._seconds, _MEMORY, *about)
            return self._worker


def _refused(why: str) -> InputError:
    said = " ".join(why.partition("<state>")[0].split())[:300].rstrip(".")
    return InputError(f"the schema is not one that answers can be held to: {said}.")


def check_schema(schema: Any) -> None:
    """Raise InputError for a schema that is too large or too deep."""
    if not isinstance(schema, dict):
        raise InputError("a schema is a JSON object.")
    if len(json.dumps(schema)) > _LARGEST_SCHEMA:
        raise InputError(f"the schema has more than {_LARGEST_SCHEMA} bytes.")
    level: list[Any] = [schema]
    for _ in range(_DEEPEST_SCHEMA):
        level = [part for value in level for part in _parts(value)]
        if not level:
            return
    raise InputError(f"the schema is deeper than {_DEEPEST_SCHEMA} levels.")


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
