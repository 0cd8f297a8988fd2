"""The responses API, for text: its requests, bodies and events."""

import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from pydantic import Field, model_validator

from qexport.errors import QexportError
from qexport.runtime.server.errors import FieldError
from qexport.runtime.server.requests import (
    ChatRequest,
    Empty,
    Message,
    ResponseFormat,
    Schema,
    Strict,
    TextPart,
    check,
)
from qexport.runtime.server.service import Exchange
from qexport.runtime.server.streams import event

__all__ = ["Response", "ResponsesRequest"]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None


class InputMessage(Strict):
    type: Literal["message"] = "message"
    phase: str | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: str | None = None
    status: str | None = None


class ResponsesRequest(Strict):
    """POST /v1/responses, for text; nothing is stored."""

    model: str
    input: str | list[InputMessage]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream: bool | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    store: Literal[False] | None = None
    user: str | None = None
    previous_response_id: None = None
    tools: Empty = None
    # neutral, as clients and answers of ours have them
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    include: Empty = None
    background: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _is_text(self) -> "ResponsesRequest":
        # the answer has them, and an answer is valid Unicode
        try:
            json.dumps([self.user, self.metadata], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise FieldError("user, metadata: they are not valid Unicode.", "user") from error
        return self

    def as_chat(self) -> ChatRequest:
        """The same as a chat. Raises FieldError for an empty input."""
        messages = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            messages.append(Message(role="user", content=self.input))
        else:
            messages += [Message(role=m.role, content=m.content) for m in self.input]
        check(bool(messages), "the input is empty", "input")
        found = None if self.text is None or self.text.format is None else self.text.format
        return ChatRequest(
            model=self.model,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            response_format=None if found is None else _response_format(found),
        )


class Response:
    """One response as it grows."""

    def __init__(self, body: ResponsesRequest, exchange: Exchange, answer: str) -> None:
        self._body, self.exchange = body, exchange
        self._id, self._item = answer, f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._number = 0

    async def whole(self) -> dict[str, Any]:
        """The body."""
        return self._made()

    def _made(self, error: str | None = None) -> dict[str, Any]:
        """The body, as far as it has come."""
        body, choice = self._body, self.exchange.choices[0]
        cut = choice.finish == "length"
        status = "in_progress" if choice.finish is None else "incomplete" if cut else "completed"
        done = choice.finish is not None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "failed" if error else status,
            "error": {"code": "server_error", "message": error} if error else None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [self._message(status, choice.text)] if done else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": body.text.model_dump(by_alias=True)
            if body.text
            else {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if done else None,
            "user": body.user,
        }

    async def events(self) -> AsyncGenerator[str, None]:
        """The stream's events, in OpenAI's order."""
        place = {"output_index": 0, "item_id": self._item, "content_index": 0}
        try:
            yield self._event("response.created", response=self._made())
            yield self._event("response.in_progress", response=self._made())
            item = {**self._message("in_progress", ""), "content": []}
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._event("response.content_part.added", **place, part=_part(""))
            async with aclosing(self.exchange.deltas()) as deltas:
                async for _, delta in deltas:
                    if delta.text:
                        more = {**place, "delta": delta.text, "logprobs": []}
                        yield self._event("response.output_text.delta", **more)
            text = self.exchange.choices[0].text
            done = {**place, "text": text, "logprobs": []}
            yield self._event("response.output_text.done", **done)
            yield self._event("response.content_part.done", **place, part=_part(text))
            whole = self._made()
            item = whole["output"][0]
            yield self._event("response.output_item.done", output_index=0, item=item)
            yield self._event(f"response.{whole['status']}", response=whole)
        except QexportError as error:
            yield self._event("response.failed", response=self._made(str(error)))
        except Exception:  # the answer has begun: an event is the only way to say it
            yield self._event("response.failed", response=self._made("internal error."))

    def _event(self, kind: str, **content: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **content}, kind)

    def _message(self, status: str, text: str) -> dict[str, Any]:
        content = [_part(text)]
        return {
            **{"id": self._item, "type": "message", "role": "assistant"},
            **{"status": status, "content": content},
        }

    def _usage(self) -> dict[str, Any]:
        counts = self.exchange.counts
        return {
            "input_tokens": counts.prompt,
            "input_tokens_details": {"cached_tokens": counts.cached},
            "output_tokens": counts.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts.prompt + counts.completion,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response_format(text: TextFormat) -> ResponseFormat:
    if text.type != "json_schema":
        return ResponseFormat(type=text.type)
    check(text.schema_ is not None, "a json_schema has a schema", "text")
    name = text.name or "answer"
    return ResponseFormat(type="json_schema", json_schema=Schema(name=name, schema=text.schema_))
