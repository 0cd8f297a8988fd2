"""Text from a model: prompts to tokens, requests to the engine, pieces of text back."""

import threading
from typing import Any

from qexport.errors import InputError
from qexport.runtime.constraint import CALL_OPEN, Grammars
from qexport.runtime.engine import Engine, Ticket
from qexport.runtime.model import Decoder
from qexport.runtime.sampler import Sampling
from qexport.runtime.scheduler import ContextError, Piece
from qexport.runtime.templates import TemplateWorker

__all__ = ["Generator", "Piece", "Sampling"]

_TOKENS = 128


class Generator:
    """One model and its tokenizer, for any number of requests at a time.

    The engine's thread begins with the first request; `close` ends it.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        end_tokens: frozenset[int] = frozenset(),
        *,
        waiting: int = 256,
    ) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.context = decoder.context
        end = tokenizer.eos_token_id
        self.end_tokens = end_tokens | (frozenset() if end is None else {end})
        self.templates = TemplateWorker()
        self.grammars = Grammars(tokenizer, decoder.vocabulary, self.end_tokens)
        # characters, or bytes where the vocabulary has those
        self._longest_token = max(map(len, tokenizer.get_vocab()))
        self._waiting = waiting
        self._engine: Engine | None = None
        self._closed = False
        self._lock = threading.Lock()

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Prompt tokens of plain text; special_tokens: with those that begin a text.

        Raises InputError for half a character, ContextError for what is too long to look at.
        """
        _check_text(text)
        if len(text) > self.context * self._longest_token:
            raise ContextError(
                f"the prompt has {len(text)} characters, which cannot fit the context of "
                f"{self.context} tokens."
            )
        made = self.tokenizer(text, add_special_tokens=special_tokens, verbose=False)
        ids: list[int] = made["input_ids"]
        return ids

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, special ones too. Raises InputError for one that is none."""
        known = self.decoder.vocabulary
        if any(not 0 <= token < known for token in tokens):
            raise InputError(f"a token is not in the vocabulary of {known}.")
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    @property
    def has_template(self) -> bool:
        """Whether the model says how conversations are written."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def tags_calls(self) -> bool:
        """Whether the template has calls of tools written as text between <tool_call> tags."""
        if not self.has_template or CALL_OPEN in self.tokenizer.all_special_tokens:
            return False
        return CALL_OPEN in self.tokenizer.get_chat_template(tools=[{}])

    def encode_chat(self, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
        """Prompt tokens of a conversation; raises what `render` and `encode` do."""
        return self.encode(self.render(messages, **variables), special_tokens=False)

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The text of a conversation; variables, `tools` among them, are the template's.

        Raises InputError where the template refuses it, or takes too much time or memory.
        """
        if not self.has_template:
            raise InputError("this model has no chat template; use plain completions.")
        template = self.tokenizer.get_chat_template(tools=variables.get("tools"))
        special = {name: str(text) for name, text in self.tokenizer.special_tokens_map.items()}
        return self.templates.render(template, messages, **{**special, **variables})

    def room(self, prompt: list[int], most: int = _TOKENS) -> int:
        """How many tokens to make where nobody says: `most`, or what the context has left."""
        return max(1, min(most, self.context - len(prompt)))

    def stream(self, prompt: list[int], sampling: Sampling) -> Ticket:
        """Generate from prompt tokens; the last piece alone has a finish_reason.

        Closing the iterator stops the work. Raises InputError for an empty prompt, a token that
        the model lacks, or a prompt that with `max_tokens` does not fit the context; QueueFullError
        where too many wait. The iterator raises QexportError if the model gives NaN.
        """
        return self.engine.submit(prompt, sampling)

    @property
    def engine(self) -> Engine:
        with self._lock:
            if self._closed:
                raise InputError("this model was closed; load it again.")
            if self._engine is None:
                backend = self.tokenizer.backend_tokenizer
                self._engine = Engine(self.decoder, backend, self.end_tokens, waiting=self._waiting)
            return self._engine

    def close(self) -> None:
        """End the engine; what still runs fails."""
        with self._lock:
            engine, self._engine, self._closed = self._engine, None, True
        if engine is not None:
            engine.close()
        self.templates.close()
        self.grammars.close()

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("the text is not valid Unicode (half a character).") from error
