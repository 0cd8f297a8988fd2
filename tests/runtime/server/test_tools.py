"""Calls of tools in a model's text, however it comes, and what grammars let through."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.runtime.constraint import Grammars
from qexport.runtime.scheduler import Piece
from qexport.runtime.server.replies import Choice
from qexport.runtime.server.requests import Tool
from qexport.runtime.server.tools import call_schema

CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
OTHER = '{"name": "clock", "parameters": {}}'


@pytest.fixture
def opened() -> Iterator[Callable[[Any], Grammars]]:
    """Grammars of a tokenizer, whose process ends with the test."""
    with ExitStack() as stack:

        def opened(tokenizer: Any) -> Grammars:
            ends = frozenset([tokenizer.eos_token_id])
            return stack.enter_context(closing(Grammars(tokenizer, len(tokenizer), ends)))

        yield opened


def tagged(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


def read(parts: list[str], parallel: bool = True) -> tuple[str, list[tuple[str, Any]], str | None]:
    """Text, calls and finish of an answer that comes in these parts, seen as a stream."""
    choice = Choice({"weather", "clock"}, parallel)
    calls: list[tuple[str, Any]] = []
    text, finish = "", None
    for number, part in enumerate(parts, 1):
        delta = choice.add(Piece(part, number, "stop" if number == len(parts) else None))
        assert delta.first_call == len(calls) or not delta.calls
        text += delta.text
        calls += [(call.name, json.loads(call.arguments)) for call in delta.calls]
        finish = delta.finish
    assert text == choice.text and len(calls) == len(choice.calls)
    return text, calls, finish


ROME: tuple[str, Any] = ("weather", {"city": "Rome"})
CLOCK: tuple[str, Any] = ("clock", {})
ANSWERS: dict[str, tuple[str, list[tuple[str, Any]]]] = {
    "hello": ("hello", []),
    "": ("", []),
    "  ": ("  ", []),
    CALL: ("", [ROME]),
    f" {CALL}\n": ("", [ROME]),
    OTHER: ("", [CLOCK]),
    tagged(CALL): ("", [ROME]),
    f"{tagged(CALL)}\n{tagged(OTHER)}\n": ("", [ROME, CLOCK]),
    f"<think>why {{}}</think>\n\n{tagged(CALL)}": ("<think>why {}</think>\n\n", [ROME]),
    f"a {tagged(CALL)} b {tagged(OTHER)}": ("a  b ", [ROME, CLOCK]),
    f"<tool_call>{CALL}": ("", [ROME]),  # a model may leave the end away
    '{"name": "nobody", "arguments": {}}': ('{"name": "nobody", "arguments": {}}', []),
    tagged('{"name": "nobody"}'): (tagged('{"name": "nobody"}'), []),
    tagged("what?"): (tagged("what?"), []),
    "<tool_call>half": ("<tool_call>half", []),
    "1 < 2 <tool": ("1 < 2 <tool", []),
    '{"a": 1}': ('{"a": 1}', []),
    "{" * 500: ("{" * 500, []),
    # JSON within JSON, as some models write it
    tagged(json.dumps({"name": "weather", "arguments": json.dumps({"city": "Rome"})})): (
        "",
        [ROME],
    ),
    tagged('{"name": "clock", "arguments": "now"}'): (
        tagged('{"name": "clock", "arguments": "now"}'),
        [],
    ),
    tagged('{"name": "weather", "arguments": {"city": "a</tool_call>b"}}'): (
        "",
        [("weather", {"city": "a</tool_call>b"})],
    ),
}


@pytest.mark.parametrize("text", ANSWERS, ids=range(len(ANSWERS)))
def test_calls_are_found_however_the_text_comes(text: str) -> None:
    shown, calls = ANSWERS[text]
    want = shown, calls, "tool_calls" if calls else "stop"
    assert read([text]) == want
    assert read([*text, ""]) == want
    for size in (2, 7):
        assert read([text[i : i + size] for i in range(0, len(text), size)] or [""]) == want


@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", CALL, "{", " ", "x<", '{"name"'])))
def test_parting_a_text_changes_nothing(parts: list[str]) -> None:
    whole = "".join(parts)
    assert read([whole]) == read([*whole, ""]) == read([*parts, ""])


def test_text_that_is_no_call_is_not_held_back() -> None:
    choice = Choice({"weather"})
    assert choice.add(Piece('{"answer": ', 1)).text == '{"answer": '
    assert choice.add(Piece("42 <", 2)).text == "42 "
    assert choice.add(Piece("b>", 3)).text == "<b>"


def test_one_call_where_one_is_wanted() -> None:
    text = f"a {tagged(CALL)} b {tagged(OTHER)}"
    assert read([text], parallel=False) == ("a ", [ROME], "tool_calls")
    assert read([*text, ""], parallel=False) == ("a ", [ROME], "tool_calls")


def test_a_cut_answer_is_not_said_to_be_calls() -> None:
    choice = Choice({"weather"})
    choice.add(Piece(tagged(CALL) + " and", 9))
    assert choice.add(Piece("", 10, "length")).finish == "length"


def test_a_call_that_is_cut_is_a_call_all_the_same() -> None:
    """Not text for people to read: what there is of it, as OpenAI gives it."""
    for text in (CALL[:40], f"<tool_call>{CALL[:40]}"):
        choice = Choice({"weather"})
        delta = choice.add(Piece(text, 9, "length"))
        assert (delta.text, delta.finish) == ("", "length")
        assert [(call.name, call.arguments) for call in delta.calls] == [("weather", CALL[33:40])]


def test_grammars_leave_no_room_for_blanks(
    tiny_model: Path, opened: Callable[[Any], Grammars]
) -> None:
    """Small models fill it to the end of their tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    grammars = opened(tokenizer)
    schema: dict[str, Any] = {"type": "object", "required": ["a"]}
    schema["properties"] = {"a": {"type": "integer"}}
    schema["additionalProperties"] = False

    def takes(text: str) -> bool:
        constraint = grammars.json_schema(schema).constraint()
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            if not constraint.allowed(len(tokenizer))[token]:
                return False
            constraint.accept(token)
        return True

    assert takes('{"a": 17}')
    for text in ("{ ", '{"a" ', '{"a":  ', '{"a": 17 ', " {", '{"a": 17}\n'):
        assert not takes(text), text


def test_either_a_call_or_an_answer_of_a_form(
    tiny_model: Path, opened: Callable[[Any], Grammars]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    end = tokenizer.eos_token_id
    grammars = opened(tokenizer)
    tool = Tool.model_validate({"type": "function", "function": {"name": "clock"}})
    answer: dict[str, Any] = {"type": "object", "required": ["a"], "additionalProperties": False}
    answer |= {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "integer"}}}

    def takes(tagged_calls: bool, text: str) -> bool:
        grammar = grammars.calls_or(call_schema([tool]), answer, tagged_calls)
        constraint = grammar.constraint()
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            if not constraint.allowed(len(tokenizer))[token]:
                return False
            constraint.accept(token)
        return bool(constraint.allowed(len(tokenizer))[end])

    call = '{"name": "clock", "arguments": {}}'
    for kind in (True, False):
        assert takes(kind, '{"a": 17}')
        assert not takes(kind, '{"b": 17}')
        assert not takes(kind, "text")
        assert takes(kind, call) == (not kind)
        assert takes(kind, tagged(call)) == kind
    assert takes(True, f"{tagged(call)}\n{tagged(call)}")


def test_parameters_that_point_at_their_own_parts(
    tiny_model: Path, opened: Callable[[Any], Grammars]
) -> None:
    """As pydantic writes nested models, and OpenAI's client functions; and trees, by `#`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    grammars = opened(tokenizer)
    person = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}}}
    parameters: dict[str, dict[str, Any]] = {
        "greet": {
            "$defs": {"Person": {**person, "additionalProperties": False}},
            "type": "object",
            "properties": {"who": {"$ref": "#/$defs/Person"}},
            "required": ["who"],
            "additionalProperties": False,
        },
        "grow": {**tree, "additionalProperties": False},
    }
    tools = [
        Tool.model_validate({"type": "function", "function": {"name": name, "parameters": value}})
        for name, value in parameters.items()
    ]
    grammar = grammars.json_schema(call_schema(tools))

    def takes(name: str, arguments: Any) -> bool:
        constraint = grammar.constraint()
        text = json.dumps({"name": name, "arguments": arguments})
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            if not constraint.allowed(len(tokenizer))[token]:
                return False
            constraint.accept(token)
        return bool(constraint.allowed(len(tokenizer))[tokenizer.eos_token_id])

    assert takes("greet", {"who": {"age": 7}})
    assert not takes("greet", {"who": {"age": "7"}})
    assert takes("grow", {"left": {"left": {}}})
    assert not takes("grow", {"left": {"right": {}}})


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_in_free_text_follow_their_schemas(
    tiny_model: Path, opened: Callable[[Any], Grammars], parallel: bool
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    vocabulary, end = len(tokenizer), tokenizer.eos_token_id
    grammars = opened(tokenizer)
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = [
        Tool.model_validate({"type": "function", "function": {"name": name, **extra}})
        for name, extra in {"weather": {"parameters": parameters}, "clock": {}}.items()
    ]
    grammar = grammars.calls(call_schema(tools), parallel)

    def follow(text: str) -> tuple[str, bool]:
        """What the grammar lets through of a text, and whether the answer may end there."""
        constraint, taken = grammar.constraint(), []
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            if not constraint.allowed(vocabulary)[token]:
                break
            constraint.accept(token)
            taken.append(token)
        allowed = constraint.allowed(vocabulary)
        assert isinstance(allowed, np.ndarray)
        return tokenizer.decode(taken), bool(allowed[end])

    for text in ("", "free text {", "<think>x</think> <tool", "a " + tagged(CALL), tagged(CALL)):
        assert follow(text) == (text, True), text
    two = f"{tagged(CALL)}\n{tagged(CALL)}"
    assert follow(two) == (two if parallel else tagged(CALL), True)
    assert follow("<tool_call>\n{") == ("<tool_call>\n{", False)
    wrong = tagged(CALL.replace("Rome", "Oslo"))
    assert follow(wrong) == (wrong[: wrong.index("Oslo")], False)
    wrong = tagged(CALL.replace("weather", "nobody"))
    assert follow(wrong) == (wrong[: wrong.index("nobody")], False)
