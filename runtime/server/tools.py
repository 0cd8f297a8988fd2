"""Calls of tools: what an answer is held to, and how they are found in a model's text."""

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from qexport.runtime.server.requests import ChatRequest, Tool

__all__ = ["Call", "ToolText", "call_schema", "must_call"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_WRAPPED = re.compile(re.escape(_OPEN) + r"\s*(.*?)\s*" + re.escape(_CLOSE), re.DOTALL)


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
    """The schema of {"name", "arguments"} for one call of any of these."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


class ToolText:
    """Text of one answer that may be calls: held back while it looks like one.

    Models write {"name", "arguments"} (or "parameters"), alone or between <tool_call> tags.
    """

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._held = ""
        self._plain = not names

    def feed(self, text: str) -> str:
        """Text that is no call."""
        if self._plain:
            return text
        self._held += text
        start = self._held.lstrip()
        if start and start[0] != "{" and not _OPEN.startswith(start[: len(_OPEN)]):
            self._plain, start = True, self._held
            self._held = ""
            return start
        return ""

    def rest(self) -> tuple[str, list[Call]]:
        """What was held back: text, or calls."""
        held, self._held = self._held, ""
        calls = self._calls(held)
        return ("", calls) if calls else (held, [])

    def _calls(self, text: str) -> list[Call]:
        parts = _WRAPPED.findall(text) or [text]
        calls = [self._call(part) for part in parts]
        return [call for call in calls if call is not None] if all(calls) else []

    def _call(self, text: str) -> Call | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        return Call(name, json.dumps(arguments, ensure_ascii=False))
