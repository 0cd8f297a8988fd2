"""Text from a model, token by token: sampling, stopping, and text that never splits a character."""

from collections.abc import Generator as Stream
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from qexport.errors import InputError, QexportError

__all__ = ["Generator", "Piece", "Sampling"]


_GREEDY_BELOW = 1e-4  # smaller temperatures overflow float32 and mean the same


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to end. Raises InputError for what is no number.

    temperature 0 is greedy; top_p keeps the smallest set of tokens with that probability.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature} is not a number from 0 up.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} is not between 0 and 1.")


@dataclass(frozen=True)
class Piece:
    """New text, the tokens generated so far, and why it ended (`stop` or `length`) if it did."""

    text: str
    tokens: int
    finish_reason: str | None = None


class Generator:
    """One model and its tokenizer. It keeps no state between requests; run one at a time."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.context = int(getattr(model.config, "max_position_embeddings", 2048))
        self._end = _end_tokens(model, tokenizer)

    def encode(self, text: str) -> list[int]:
        """Prompt tokens of plain text."""
        _check_text(text)
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Prompt tokens of a conversation. Raises InputError where the template refuses it."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError("this model has no chat template; use plain completions.")
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # the template's own code: it may raise anything
            raise InputError(f"the chat template refuses these messages ({error}).") from error
        _check_text(text)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def stream(self, prompt: list[int], sampling: Sampling) -> Stream[Piece, None, None]:
        """Generate from prompt tokens; the last piece alone has a finish_reason.

        Closing the iterator stops the work. Raises InputError for an empty prompt, a token that
        the model lacks, or a prompt that with `max_tokens` does not fit the context; QexportError
        if the model gives NaN.
        """
        if not prompt:
            raise InputError("the prompt is empty.")
        if max(prompt) >= self.model.config.vocab_size:
            raise InputError(f"token {max(prompt)} is not in the model's vocabulary.")
        if len(prompt) + sampling.max_tokens > self.context:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, and with {sampling.max_tokens} more it does "
                f"not fit the context of {self.context}."
            )
        return self._stream(prompt, sampling)

    def _stream(self, prompt: list[int], sampling: Sampling) -> Stream[Piece, None, None]:
        decoder = DecodeStream(ids=prompt, skip_special_tokens=True)
        stopper = _StopText(sampling.stop)
        backend = self.tokenizer.backend_tokenizer
        count = 0
        for token in self._tokens(prompt, sampling):
            count += 1
            if token in self._end:
                yield Piece(stopper.rest(), count, "stop")
                return
            text = stopper.feed(decoder.step(backend, token) or "")
            if stopper.found:
                yield Piece(text, count, "stop")
                return
            yield Piece(text, count)
        yield Piece(stopper.rest(), count, "length")

    def _tokens(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        sampler = _Sampler(sampling, self.model.device)
        ids = torch.tensor([prompt], device=self.model.device)
        cache = None
        for _ in range(sampling.max_tokens):
            with torch.inference_mode():
                output = self.model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                token = sampler.choose(output.logits[0, -1].float())
            cache = output.past_key_values
            yield token
            ids = torch.tensor([[token]], device=self.model.device)


class _Sampler:
    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._random = torch.Generator(device)
        if sampling.seed is not None:
            self._random.manual_seed(sampling.seed)
        else:
            self._random.seed()

    def choose(self, logits: Tensor) -> int:
        """The next token from float32 logits [vocabulary]."""
        if not bool(logits.isfinite().any()) or bool(logits.isnan().any()):
            raise QexportError("the model gave NaN; its weights or its dtype are at fault.")
        if self._sampling.temperature < _GREEDY_BELOW:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / self._sampling.temperature, dim=-1)
        if self._sampling.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self._sampling.top_p
            probabilities[index[beyond]] = 0
        return int(torch.multinomial(probabilities, 1, generator=self._random))


class _StopText:
    """Holds back text that may be the start of a stop string, and ends before a whole one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Text that is safe to show after `text` was added."""
        self._held += text
        cuts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if cuts:
            self.found = True
            shown, self._held = self._held[: min(cuts)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown

    def rest(self) -> str:
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("the text has half a surrogate pair, which is no character.") from error


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    found = [tokenizer.eos_token_id]
    for config in (model.config, model.generation_config):
        value = getattr(config, "eos_token_id", None)
        found.extend(value if isinstance(value, list) else [value])
    return frozenset(token for token in found if token is not None)
