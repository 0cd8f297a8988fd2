import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from qexport.data import documents, is_held_out, tokenize, windows
from qexport.errors import DataError, InputError


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def test_builtin_splits_are_apart_and_whole(tokenizer: Any) -> None:
    parts = [list(documents("builtin", s, tokenizer)) for s in ("train", "calibration", "eval")]
    everything = list(documents("builtin", "all", tokenizer))
    assert sorted(text for part in parts for text in part) == sorted(everything)
    assert all(parts)
    assert len(parts[0]) > len(parts[2])


def test_tokens_are_the_documents_with_eos_between(tokenizer: Any) -> None:
    tokens = tokenize(["ab", "", "c<|end|>"], tokenizer)
    eos = tokenizer.eos_token_id
    ab, c = tokenizer("ab")["input_ids"], tokenizer("c")["input_ids"]
    assert tokens.tolist() == [*ab, eos, *c, eos]


def test_windows_drop_what_is_left_over() -> None:
    assert windows(torch.arange(10), 4, "--length").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(DataError, match="10 tokens, fewer than one window of 11"):
        windows(torch.arange(10), 11, "--length")


def test_one_document_in_twenty_is_held_out_wherever_it_stands() -> None:
    held = [number for number in range(400) if is_held_out(f"document {number}")]
    assert held[:3] == [6, 10, 39]
    assert 5 <= len(held) <= 40


def test_jsonl_of_text_and_of_messages(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path.write_text(json.dumps({"text": "plain"}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    found = list(documents(str(path), "all", tokenizer))
    assert found == ["plain", "<|user|>hi<|end|><|assistant|>ho<|end|>"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n\n", "is empty"),
        ("a.txt", " \n", "is empty"),
        ("a.jsonl", '{"text": "x"}\n' * 999 + '{"text": ', "a.jsonl line 1000 is not valid JSON"),
        ("a.jsonl", '{"txt": "x"}', 'line 1 has neither "text" nor "messages"'),
        ("a.jsonl", '["x"]', "line 1 has neither"),
        ("a.jsonl", '{"text": 5}', 'line 1: "text" is not a string'),
        ("a.jsonl", '{"messages": "hi"}', 'line 1: "messages" is not a list'),
        ("a.jsonl", '{"messages": [{"rol": 1}]}', "line 1: messages are not objects"),
        ("a.jsonl", '{"messages": []}', "line 1: messages are not objects"),
    ],
)
def test_bad_rows_are_named(
    tmp_path: Path, tokenizer: Any, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(documents(str(tmp_path / name), "all", tokenizer))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_files_that_are_not_text(tmp_path: Path, tokenizer: Any, name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        list(documents(str(tmp_path / name), "all", tokenizer))
    (tmp_path / name).write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(DataError, match="UTF-8"):
        list(documents(str(tmp_path / name), "all", tokenizer))


def test_a_dataset_folder_is_read_by_the_datasets_library(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(documents(str(folder), "train", tokenizer)) == ["one", "two"]


def test_a_dataset_that_cannot_be_fetched(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="nor a dataset that can be fetched"):
        list(documents("no-such-owner/no-such-dataset", "train", tokenizer))


def test_a_model_is_no_dataset(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is a folder without data"):
        list(documents(str(tmp_path), "train", tokenizer))


def test_no_more_is_read_than_is_wanted(tokenizer: Any) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "again and again"

    whole = tokenize(["again and again"] * 10, tokenizer)
    assert torch.equal(tokenize(endless(), tokenizer, 33), whole[:33])
