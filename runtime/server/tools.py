"""Calls of tools: what an answer is held to, and how they are found in a model's text."""

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from qexport.runtime.constraint import CALL_CLOSE, CALL_OPEN
from qexport.runtime.server.requests import ChatRequest, Tool

__all__ = ["Call", "ToolText", "call_schema", "must_call", "offered"]

# a call whose end did not come: its name, and what there is of its arguments
_UNENDED = re.compile(
    r'\s*{\s*"name"\s*:\s*"([^"]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*([^\s].*)', re.S
)
# how an answer begins that is nothing but a call, without its blanks
_BARE = ('{"name":', '{"arguments":', '{"parameters":')


@dataclass(frozen=True)
class Call:
    """One call of a tool; arguments are JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def offered(body: ChatRequest) -> list[Tool]:
    """The tools that an answer may call."""
    return [] if body.tool_choice == "none" else body.tools or []


def must_call(body: ChatRequest) -> list[Tool] | None:
    """The tools of which one has to be called; None where text will do."""
    choice, tools = body.tool_choice, body.tools or []
    if choice is None or choice in ("none", "auto"):
        return None
    if choice == "required":
        return tools
    assert not isinstance(choice, str)
    return [tool for tool in tools if tool.function.name == choice.function.name]


def call_schema(tools: list[Tool]) -> dict[str, Any]:
    """The schema of {"name", "arguments"} for one call of any of these.

    A tool's parameters may point at parts of themselves (`#/$defs/…`, as pydantic writes them):
    such ones stand at the root, and are pointed at there.
    """
    calls, definitions = [], {}
    for number, tool in enumerate(tools):
        parameters = tool.function.parameters or {"type": "object"}
        place = f"#/$defs/{number}"
        moved = _pointing_to(parameters, place)
        if moved != parameters:
            definitions[str(number)], parameters = moved, {"$ref": place}
        call = {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        calls.append(call)
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": definitions} if definitions else schema


def _pointing_to(schema: Any, place: str) -> Any:
    """A schema whose pointers are right when it stands at `place` in another one."""
    if isinstance(schema, list):
        return [_pointing_to(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _pointing_to(value, place)
        for key, value in schema.items()
    }


class ToolText:
    """Parts the text of one answer into text and calls, as it comes.

    Models write {"name", "arguments"} (or "parameters"): between <tool_call> tags, wherever they
    like, or as the whole answer. What may become a call is held back until it is one or cannot be.

    names     of the tools that may be called
    parallel  whether more than one call is wanted; if not, what follows the first is dropped
    """

    def __init__(self, names: set[str], parallel: bool = True) -> None:
        self._names, self._parallel = names, parallel
        self._held = ""
        self._after_call = False
        self._part = self._beginning if names else self._plain

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """Text that is no call, and calls that are complete."""
        self._held += text
        shown: list[str] = []
        calls: list[Call] = []
        while self._part(shown, calls):
            pass
        return "".join(shown), calls

    def rest(self, cut: bool = False) -> tuple[str, list[Call]]:
        """What was held back to the end; `cut` where tokens ran out before it."""
        held, self._held = self._held, ""
        opened = self._part == self._call
        if opened or self._part == self._bare:
            call = self._read(held) or (self._begun(held) if cut else None)
            if call is not None:
                return "", [call]
        if self._after_call and not held.strip():
            held = ""
        return (CALL_OPEN if opened else "") + held, []

    # Each part takes what it can from the front of `held`, and says whether the next one may go on.

    def _plain(self, shown: list[str], calls: list[Call]) -> bool:
        shown.append(self._held)
        self._held = ""
        return False

    def _beginning(self, shown: list[str], calls: list[Call]) -> bool:
        start = "".join(self._held[:1000].split())
        if any(start.startswith(bare) for bare in _BARE):
            self._part = self._bare
            return False
        if any(bare.startswith(start) for bare in _BARE):
            return False
        self._part = self._text
        return True

    def _bare(self, shown: list[str], calls: list[Call]) -> bool:
        return False

    def _text(self, shown: list[str], calls: list[Call]) -> bool:
        text, opened, after = self._held.partition(CALL_OPEN)
        kept = 0 if opened else _opening(text)
        text, begun = text[: len(text) - kept], text[len(text) - kept :]
        if self._after_call and not text.strip():  # blanks between calls are nobody's text
            if not opened:
                return False
            text = ""
        shown.append(text)
        self._after_call = False
        self._held = after if opened else begun
        if opened:
            self._part = self._call
        return bool(opened)

    def _call(self, shown: list[str], calls: list[Call]) -> bool:
        inner, closed, after = self._held.partition(CALL_CLOSE)
        while closed and _in_a_string(inner):  # an argument may hold the very words
            more, closed, after = after.partition(CALL_CLOSE)
            inner += CALL_CLOSE + more
        if not closed:
            return False
        call = self._read(inner)
        if call is None:
            shown.append(CALL_OPEN + inner + CALL_CLOSE)
        else:
            calls.append(call)
            self._after_call = True
        over = call is not None and not self._parallel
        self._held = "" if over else after
        self._part = self._nothing if over else self._text
        return True

    def _nothing(self, shown: list[str], calls: list[Call]) -> bool:
        self._held = ""
        return False

    def _begun(self, text: str) -> Call | None:
        """A call whose end did not come, with what there is of its arguments."""
        found = _UNENDED.match(text)
        return Call(found[1], found[2]) if found and found[1] in self._names else None

    def _read(self, text: str) -> Call | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):  # some models write JSON within JSON
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        return Call(name, json.dumps(arguments, ensure_ascii=False))


def _in_a_string(text: str) -> bool:
    """Whether this is the beginning of a JSON value, up to somewhere in one of its strings."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except RecursionError:
        pass
    return False


def _opening(text: str) -> int:
    """Characters at the end of `text` that may be the beginning of a call."""
    for length in range(min(len(text), len(CALL_OPEN) - 1), 0, -1):
        if CALL_OPEN.startswith(text[-length:]):
            return length
    return 0
