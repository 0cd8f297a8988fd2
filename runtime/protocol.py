"""OpenAI's requests and answers, as far as this server speaks them; the rest is refused by name."""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qexport.runtime.generator import Sampling

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "Reply",
    "error_body",
    "usage",
]

_LONGEST_MESSAGE = 500  # a request must not choose the size of its answer
_DEFAULT_TOKENS = {"chat.completion": 512, "text_completion": 16}

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False


class Request(_Strict):
    """The fields of both kinds of request. A field that is not listed is an error, not ignored."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    user: str | None = None

    def sampling(self, max_tokens: int | None) -> Sampling:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stops),
        )


class CompletionRequest(Request):
    """POST /v1/completions; a prompt is text or token ids."""

    prompt: str | list[Annotated[int, Field(ge=0)]]


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """Role and plain text, the form that chat templates take."""
        if isinstance(self.content, str):
            text = self.content
        else:
            text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class Reply:
    """The identity of one answer, and its bodies: whole, or chunk by chunk."""

    def __init__(self, kind: Literal["chat.completion", "text_completion"], model: str) -> None:
        self._kind = kind
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    @property
    def default_tokens(self) -> int:
        """Tokens to generate where the request names no limit."""
        return _DEFAULT_TOKENS[self._kind]

    def whole(self, text: str, finish: str | None, counts: dict[str, int]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self._kind == "chat.completion":
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return {**self._head, "object": self._kind, "choices": [choice], "usage": counts}

    def opening(self) -> dict[str, Any] | None:
        """The chunk that names the role, which chats begin with."""
        if self._kind == "chat.completion":
            return self._chunk({"delta": {"role": "assistant", "content": ""}}, None)
        return None

    def chunk(self, text: str, finish: str | None) -> dict[str, Any]:
        if self._kind == "chat.completion":
            return self._chunk({"delta": {"content": text} if text else {}}, finish)
        return self._chunk({"text": text}, finish)

    def closing(self, counts: dict[str, int]) -> dict[str, Any]:
        """The last chunk of a stream that asked for usage: no choices, only the counts."""
        return {**self._head, "object": self._object(), "choices": [], "usage": counts}

    def _chunk(self, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, "finish_reason": finish, **content}
        return {**self._head, "object": self._object(), "choices": [choice]}

    def _object(self) -> str:
        return "chat.completion.chunk" if self._kind == "chat.completion" else self._kind


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Token counts in OpenAI's form."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def error_body(
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """An error in OpenAI's form; `kind` is its `type`."""
    message = message[:_LONGEST_MESSAGE]
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
