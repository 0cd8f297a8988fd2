"""OpenAI's requests, as far as this server speaks them; every other field is refused by name."""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from qexport.runtime.sampler import Sampling
from qexport.runtime.server.errors import FieldError
from qexport.runtime.server.limits import Limits

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "Empty",
    "GenerateRequest",
    "Message",
    "ResponseFormat",
    "Schema",
    "Strict",
    "TextPart",
    "TokenizeRequest",
    "Tool",
    "ToolChoice",
    "check",
]

_TEMPLATE_VARIABLES = ("enable_thinking", "thinking", "reasoning_effort")
_LONGEST_TEMPLATE_VALUE = 100

Token = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]


def _kind(prompt: Any) -> str:
    """Which of its forms a prompt has: its first element says, so that errors are of one alone."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else 0
    return "texts" if isinstance(first, str) else "many" if isinstance(first, list) else "tokens"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[Annotated[list[str], Field(fail_fast=True)], Tag("texts")]
    | Annotated[Annotated[list[Tokens], Field(fail_fast=True)], Tag("many")],
    Discriminator(_kind),
]


Empty = Annotated[list[Any], Field(max_length=0)] | None  # neutral, and nothing else


class Strict(BaseModel):
    """A part of a request: no field that is not known, no number that is none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class StreamOptions(Strict):
    include_usage: bool | None = None


class GenerateRequest(Strict):
    """What requests for text have in common."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=1024)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    ignore_eos: bool | None = None
    user: str | None = None

    @field_validator("stop")
    @classmethod
    def _is_unicode(cls, stop: str | list[str] | None) -> str | list[str] | None:
        try:
            "".join(stop or ()).encode()
        except UnicodeEncodeError as error:
            raise FieldError("stop: it is not valid Unicode.", "stop") from error
        return stop

    @model_validator(mode="after")
    def _streams(self) -> "GenerateRequest":
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options: they are for streams.", "stream_options")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def wanted_logprobs(self) -> int | None:
        """Most probable tokens that are wanted beside each one; None for no logprobs."""
        return None

    def limit(self) -> int | None:
        """Tokens that may be generated, where the request says."""
        return self.max_tokens

    def sampling(self, max_tokens: int, limits: Limits, index: int = 0) -> Sampling:
        """How choice `index` is sampled. Raises FieldError."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        check(len(stops) <= limits.stops, f"more than {limits.stops} stop strings", "stop")
        wrong = any(not stop or len(stop) > limits.stop_length for stop in stops)
        check(not wrong, f"a stop string has 1 to {limits.stop_length} characters", "stop")
        logprobs = self.wanted_logprobs()
        most = limits.logprobs
        check((logprobs or 0) <= most, f"at most {most} logprobs are given", "logprobs")
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=_biases(self.logit_bias),
            seed=None if self.seed is None else (self.seed + index) % 2**63,
            stop=stops,
            logprobs=logprobs,
            ignore_end=bool(self.ignore_eos),
        )


class CompletionRequest(GenerateRequest):
    """POST /v1/completions; prompts are texts or token ids."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0)
    best_of: Literal[1] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _scored(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise FieldError("logprobs: those of an echoed prompt are not served.", "logprobs")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(part, int) for part in self.prompt) and self.prompt:
            return [[int(part) for part in self.prompt if isinstance(part, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]

    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(Strict):
    """Text in a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Empty = None
    logprobs: Empty = None


class FunctionCall(Strict):
    name: str
    arguments: str

    def parsed(self) -> dict[str, Any]:
        """The arguments; no text is none of them. Raises ValueError for what is no JSON object."""
        try:
            found = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"the arguments of a call of {self.name} are no JSON object")
        return found


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """With arguments as an object: that is what chat templates write out as JSON."""
        function = {"name": self.function.name, "arguments": self.function.parsed()}
        return {"id": self.id, "type": self.type, "function": function}


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # what clients send back of an answer of ours
    refusal: None = None
    annotations: Empty = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError("a message has content, or the assistant's tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are the assistant's")
        for call in self.tool_calls or ():
            call.function.parsed()
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool's message says which call it answers, by tool_call_id")
        return self

    def for_template(self) -> dict[str, Any]:
        """The form that chat templates take."""
        found: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": _text(self.content),
        }
        if self.tool_calls:
            found["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            found["name"] = self.name
        return found


class Function(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class Schema(Strict):
    """The JSON schema of an answer."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What an answer is held to."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and only to it")
        return self


class ChatRequest(GenerateRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, bool | int | str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs: they need logprobs: true.", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            text = "max_completion_tokens: max_tokens says another number; give one of them."
            raise FieldError(text, "max_completion_tokens")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise FieldError("tool_choice: it needs tools.", "tool_choice")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise FieldError("tools: two have the same name.", "tools")
        return self

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def template_variables(self) -> dict[str, Any]:
        """Raises FieldError for those that templates must not get from a request."""
        found = self.chat_template_kwargs or {}
        for name, value in found.items():
            known = ", ".join(_TEMPLATE_VARIABLES)
            text = f"{name[:50]} is not a template's variable that requests may set; {known} are"
            check(name in _TEMPLATE_VARIABLES, text, "chat_template_kwargs")
            short = not isinstance(value, str) or len(value) <= _LONGEST_TEMPLATE_VALUE
            check(short, f"{name} is too long", "chat_template_kwargs")
        return dict(found)


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages are needed")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens


def check(holds: bool, message: str, param: str) -> None:
    """Raise FieldError where a field of a request does not hold."""
    if not holds:
        raise FieldError(f"{param}: {message}.", param)


def _text(content: str | list[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _biases(given: dict[str, float] | None) -> dict[int, float]:
    found = {}
    for token, bias in (given or {}).items():
        check(token.isascii() and token.isdigit(), "keys are token ids", "logit_bias")
        check(len(token) < 10 and -100 <= bias <= 100, "values are -100 to 100", "logit_bias")
        found[int(token)] = bias
    return found
