"""From tokens to text that never splits a character, and stop strings across token borders."""

from typing import Any

__all__ = ["StopText", "TextStream"]


_BEFORE = 6  # tokens of the prompt that a first token's text may depend on
_LONGEST = 16  # tokens that may wait for the rest of a character
_WINDOW = 64  # tokens that are looked at again for each new one
_BROKEN = "\ufffd"


class TextStream:
    """Text of one sequence, token by token, held back while it may become a stop string."""

    def __init__(self, tokenizer: Any, prompt: list[int], stops: tuple[str, ...]) -> None:
        self._decoder = _Detokenizer(tokenizer, prompt)
        self._stopper = StopText(stops)

    def add(self, token: int) -> str:
        """Text that is safe to show after `token`."""
        return self._stopper.feed(self._decoder.add(token))

    @property
    def stopped(self) -> bool:
        return self._stopper.found

    def rest(self) -> str:
        """What was held back."""
        shown = self._stopper.feed(self._decoder.rest())
        return shown if self._stopper.found else shown + self._stopper.rest()


class _Detokenizer:
    """Decodes a window of tokens whose start moves on whenever whole characters came out.

    What a token's text is depends on its neighbours (spaces, bytes of one character), so that the
    text of the window with it is compared with the text without it.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = prompt[-_BEFORE:]
        self._shown = len(self._window)  # tokens of the window whose text is out

    def add(self, token: int) -> str:
        """Text that `token` completes."""
        self._window.append(token)
        text = self._new()
        if text.endswith(_BROKEN) and len(self._window) - self._shown < _LONGEST:
            return ""  # perhaps the beginning of a character
        return self._move_on(text)

    def rest(self) -> str:
        """Text of tokens that still wait for others."""
        return self._move_on(self._new()) if self._shown < len(self._window) else ""

    def _new(self) -> str:
        return self._text(self._window)[len(self._text(self._window[: self._shown])) :]

    def _move_on(self, text: str) -> str:
        if text:
            self._window = self._window[self._shown :]
            self._shown = len(self._window)
        elif len(self._window) > _WINDOW:  # of tokens without text
            self._window = self._window[-_BEFORE:]
            self._shown = len(self._window)
        return text

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


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
