"""Which parts of a conversation are the assistant's, for templates of several kinds."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qexport.chat import render, replies
from qexport.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>"
    "{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
# the last message alone keeps its thoughts, as in Qwen3's
REWRITING = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if loop.last %}<think>{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "ho ho"},
]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def said(tokenizer: Any, template: str) -> list[str]:
    tokenizer.chat_template = template
    text = render(CHAT, tokenizer, "row 1")
    return [text[start:end] for start, end in replies(CHAT, text, tokenizer, "row 1")]


def test_what_follows_a_generation_prompt_is_the_assistants(tokenizer: Any) -> None:
    assert said(tokenizer, CHATML) == ["ho<|im_end|>\n", "ho ho<|im_end|>\n"]


def test_a_templates_own_marks_are_followed(tokenizer: Any) -> None:
    assert said(tokenizer, MARKED) == ["ho!", "ho ho!"]


def test_a_template_that_rewrites_what_it_wrote_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 1: the chat template writes earlier messages other"):
        said(tokenizer, REWRITING)
    one = CHAT[1:3]  # a single answer it does not rewrite
    text = render(one, tokenizer, "row 1")
    with pytest.raises(DataError):  # but it puts the mark between the prompt and the answer
        replies(one, text, tokenizer, "row 1")


def test_a_template_that_fails_names_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[9].content.nothing }}"
    with pytest.raises(DataError, match="file line 7: the chat template refuses it"):
        render(CHAT, tokenizer, "file line 7")
    tokenizer.chat_template = "{% generation %}{{ messages[9].x.y }}{% endgeneration %}"
    with pytest.raises(DataError, match="file line 7: the chat template refuses it"):
        replies(CHAT, "", tokenizer, "file line 7")
