"""The process that tries grammars: a client's own, of which a few bytes may take hours to compile.

`python -m qexport.runtime.grammar_worker BYTES SECONDS TOKENIZER VOCABULARY ENDS`, the tokenizer a
file of the tokenizers library; a line has {"grammar"}, and its answer is {} or {"wrong"}.
"""

import sys
from pathlib import Path
from typing import Any

from qexport.runtime.worker import answer_lines

__all__ = ["main", "wrong_with"]


def wrong_with(grammar: str, tokenizer: Any) -> str:
    """What llguidance has against a grammar, over its own tokenizer; nothing if it is good."""
    from llguidance import LLMatcher

    wrong = LLMatcher.validate_grammar(grammar, tokenizer)
    if not wrong:
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        matcher.compute_bitmask()  # what is too much for it shows here
        wrong = matcher.get_error()
    return str(wrong or "")


def main() -> None:
    """Answer until stdin ends."""
    from llguidance import LLTokenizer

    text = Path(sys.argv[3]).read_text(encoding="utf-8")
    ends = [int(end) for end in sys.argv[5].split(",") if end]
    tokenizer = LLTokenizer(text, n_vocab=int(sys.argv[4]), eos_token=ends or None)

    def answer(work: dict[str, Any]) -> dict[str, str]:
        try:
            wrong = wrong_with(work["grammar"], tokenizer)
        except BaseException as error:  # a panic of Rust is no Exception
            wrong = str(error) or type(error).__name__
        return {"wrong": wrong} if wrong else {}

    answer_lines(answer)


if __name__ == "__main__":
    main()
