"""Conversations as text, and which parts of it the assistant has said."""

import re
from typing import Any

from qexport.errors import DataError

__all__ = ["Span", "render", "replies"]

Span = tuple[int, int]  # characters from the first to before the second
_MARKED = re.compile(r"\{%-?\s*generation\b")  # a template that says itself what is generated


def render(messages: object, tokenizer: Any, where: str) -> str:
    """`messages` through the tokenizer's chat template.

    Raises DataError, which begins with `where`, for messages that are none, a tokenizer without a
    template, and where the template refuses.
    """
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DataError(f"{where}: messages are not objects with a role and content.")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} has messages, but the model has no chat template; use rows with text."
        )
    return _rendered(messages, tokenizer, where)


def replies(messages: list[Any], text: str, tokenizer: Any, where: str) -> tuple[Span, ...]:
    """Where in their rendered `text` the assistant's messages stand, with what ends each.

    By the template's own marks where it has them; otherwise by rendering the messages up to each,
    which wants a template that leaves what it has written. Raises DataError for any other.
    """
    template = tokenizer.chat_template
    if isinstance(template, str) and _MARKED.search(template):
        return _marked(messages, tokenizer, where)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _rendered(messages[:index], tokenizer, where, add_generation_prompt=True)
            after = _rendered(messages[: index + 1], tokenizer, where)
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{where}: the chat template writes earlier messages otherwise when later ones "
                    "follow, so that the assistant's part cannot be told; use --loss-on all."
                )
            spans.append((len(before), len(after)))
    return tuple(spans)


def _rendered(messages: list[Any], tokenizer: Any, where: str, **how: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except Exception as error:  # the template's own code: it may raise anything
        raise DataError(f"{where}: the chat template refuses it ({error}).") from error
    return text


def _marked(messages: list[Any], tokenizer: Any, where: str) -> tuple[Span, ...]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        _, spans = render_jinja_template(
            [messages],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # as above
        raise DataError(f"{where}: the chat template refuses it ({error}).") from error
    return tuple((int(start), int(end)) for start, end in spans[0])


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value
