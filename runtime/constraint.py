"""Answers that follow a grammar: JSON, a JSON schema, a call of a tool (through llguidance).

A `Grammar` is checked once, off the engine's thread; each answer has a `Constraint` of its own,
which says what tokens may come next.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import InputError, QexportError

__all__ = ["CALL_CLOSE", "CALL_OPEN", "Constraint", "Grammar", "Grammars", "check_schema"]

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"  # as Hermes, Qwen and SmolLM2 write them

_LARGEST_SCHEMA = 64 << 10  # bytes
_DEEPEST_SCHEMA = 64
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
    """Makes grammars for a model's tokenizer (a fast one of transformers)."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: frozenset[int]) -> None:
        self._source, self._vocabulary, self._end = tokenizer, vocabulary, end_tokens
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """llguidance's, made when it is first wanted: it takes a second."""
        if self._tokenizer is None:
            from llguidance.hf import from_tokenizer

            ends = sorted(self._end) or None
            self._tokenizer = from_tokenizer(self._source, self._vocabulary, ends)
        return self._tokenizer

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

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
            wrong = LLMatcher.validate_grammar(text, self.tokenizer)
            matcher = LLMatcher(self.tokenizer, text, log_level=0)
            matcher.compute_bitmask()  # what is too much for it shows here
            wrong = wrong or matcher.get_error()
        except BaseException as error:  # a panic of Rust is no Exception
            if isinstance(error, (SystemExit, KeyboardInterrupt)):
                raise
            wrong = str(error)
        if wrong:
            said = " ".join(wrong.partition("<state>")[0].split())[:300].rstrip(".")
            raise InputError(f"the schema is not one that answers can be held to: {said}.")
        return Grammar(matcher)


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
