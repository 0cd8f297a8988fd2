"""From tokens to text that never splits a character, and stop strings across token borders."""

from typing import Any

from tokenizers.decoders import DecodeStream

__all__ = ["StopText", "TextStream"]


class TextStream:
    """Text of one sequence, token by token, held back while it may become a stop string."""

    def __init__(self, tokenizer: Any, prompt: list[int], stops: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(ids=prompt, skip_special_tokens=True)
        self._stopper = StopText(stops)

    def add(self, token: int) -> str:
        """Text that is safe to show after `token`."""
        return self._stopper.feed(self._decoder.step(self._tokenizer, token) or "")

    @property
    def stopped(self) -> bool:
        return self._stopper.found

    def rest(self) -> str:
        """What was held back."""
        return self._stopper.rest()


class StopText:
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
        end = len(self._held) - keep
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def rest(self) -> str:
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
