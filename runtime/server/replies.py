"""OpenAI's answers: whole, and chunk by chunk."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from qexport.runtime.sampler import TokenLogprob
from qexport.runtime.scheduler import Piece
from qexport.runtime.server.tools import Call, ToolText

__all__ = ["Choice", "Counts", "Delta", "Reply"]

Kind = Literal["chat.completion", "text_completion"]
Spell = Callable[[int], bytes]  # a token's own bytes


@dataclass
class Counts:
    """Tokens of one request."""

    prompt: int
    completion: int = 0
    cached: int = 0

    def body(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True)
class Delta:
    """What one piece adds to a choice; its calls are numbered from `first_call`."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    calls: tuple[Call, ...] = ()
    first_call: int = 0
    finish: str | None = None


@dataclass
class Choice:
    """One answer as it grows; `tools` are names of what it may call, `parallel` at a time."""

    tools: set[str] = field(default_factory=set)
    parallel: bool = True
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None

    def __post_init__(self) -> None:
        self._tool_text = ToolText(self.tools, self.parallel)

    def add(self, piece: Piece) -> Delta:
        """Take a piece in, and say what is new."""
        text, calls = self._tool_text.feed(piece.text)
        first_call = len(self.calls)
        if piece.finish_reason is not None:
            rest, last = self._tool_text.rest(cut=piece.finish_reason == "length")
            text, calls = text + rest, calls + last
        self.text += text
        self.calls += calls
        if piece.finish_reason is not None:
            called = self.calls and piece.finish_reason == "stop"
            self.finish = "tool_calls" if called else piece.finish_reason
        logprobs = () if piece.logprob is None else (piece.logprob,)
        self.logprobs += logprobs
        return Delta(text, logprobs, tuple(calls), first_call, self.finish)


class Reply:
    """The identity of one answer, and its bodies."""

    def __init__(self, kind: Kind, model: str, spell: Spell, with_logprobs: bool) -> None:
        self._kind, self._spell, self._with_logprobs = kind, spell, with_logprobs
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._offsets: dict[int, int] = {}  # characters of each choice's text so far

    def whole(self, choices: list[Choice], counts: Counts) -> dict[str, Any]:
        bodies = []
        for index, choice in enumerate(choices):
            content: dict[str, Any] = {"text": choice.text}
            if self._kind == "chat.completion":
                message: dict[str, Any] = {"role": "assistant", "content": choice.text}
                message["refusal"] = None
                if choice.calls:
                    message["content"] = choice.text or None
                    message["tool_calls"] = [call.body() for call in choice.calls]
                content = {"message": message}
            logprobs = self._logprobs(choice.logprobs, index)
            bodies.append(
                {"index": index, **content, "logprobs": logprobs, "finish_reason": choice.finish}
            )
        return {**self._head, "object": self._kind, "choices": bodies, "usage": counts.body()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that names the role, which chats begin with."""
        if self._kind == "text_completion":
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of one piece: its content, and its end in a chunk of its own."""
        found = []
        logprobs = self._logprobs(list(delta.logprobs), index)
        if delta.text or delta.logprobs:
            content = self._content({"content": delta.text}, delta.text)
            found.append(self._chunk(index, content, logprobs, None))
        if delta.calls:
            numbered = enumerate(delta.calls, delta.first_call)
            calls = [{"index": number, **call.body()} for number, call in numbered]
            found.append(self._chunk(index, {"delta": {"tool_calls": calls}}, None, None))
        if delta.finish is not None:
            found.append(self._chunk(index, self._content({}, ""), None, delta.finish))
        return found

    def echo(self, index: int, text: str) -> dict[str, Any]:
        """The chunk that gives a prompt back."""
        return self._chunk(index, {"text": text}, None, None)

    def closing(self, counts: Counts) -> dict[str, Any]:
        """The last chunk of a stream that asked for usage: no choices, only the counts."""
        return {**self._head, "object": self._object(), "choices": [], "usage": counts.body()}

    def _content(self, delta: dict[str, Any], text: str) -> dict[str, Any]:
        return {"delta": delta} if self._kind == "chat.completion" else {"text": text}

    def _chunk(
        self, index: int, content: dict[str, Any], logprobs: Any, finish: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "object": self._object(), "choices": [choice]}

    def _object(self) -> str:
        return "chat.completion.chunk" if self._kind == "chat.completion" else self._kind

    def _logprobs(self, tokens: list[TokenLogprob], index: int) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        if self._kind == "chat.completion":
            content = [
                {
                    **self._named(token.token, token.logprob),
                    "top_logprobs": [self._named(*top) for top in token.top],
                }
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        texts = [self._text(token.token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self._key(top): _finite(value) for top, value in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self._spell(token)
        text = spelled.decode(errors="replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(spelled)}

    def _key(self, token: int) -> str:
        """A token's text, or what OpenAI writes for bytes that are part of a character."""
        spelled = self._spell(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _text(self, token: int) -> str:
        return self._spell(token).decode(errors="replace")


def _finite(logprob: float) -> float:
    """JSON has no infinity: what cannot be is as improbable as OpenAI says it."""
    return max(logprob, -9999.0)
