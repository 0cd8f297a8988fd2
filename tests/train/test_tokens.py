"""Tokens on disk: the same as without a cache, made once, and what of chats is a target."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from qexport.data import documents, is_held_out, tokenize
from qexport.errors import DataError, InputError
from qexport.formats import open_checkpoint
from qexport.runtime.loader import load_model
from qexport.training import TrainConfig, train
from qexport.training.text import load_text
from qexport.training.tokens import Request, tokens_of


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QEXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def quiet(_: str) -> None: ...


def rows(path: Path, count: int = 60) -> Path:
    lines = (json.dumps({"text": f"document {i} " * (1 + i % 5)}) for i in range(count))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_they_are_the_documents_tokens_apart_by_document(tmp_path: Path, tokenizer: Any) -> None:
    path = rows(tmp_path / "rows.jsonl")
    read = list(documents(str(path), "train", tokenizer))
    texts = [[text for text in read if is_held_out(text) is apart] for apart in (False, True)]
    found = tokens_of(Request(str(path)), tokenizer, quiet)
    for part, wanted in zip(found, texts, strict=True):
        assert part.ids.dtype == torch.int32
        assert part.ids.tolist() == tokenize(wanted, tokenizer).tolist()
        assert part.targets is None
    whole, none = tokens_of(Request(str(path), hold_out=False), tokenizer, quiet)
    assert len(whole.ids) == sum(len(part.ids) for part in found)
    assert len(none.ids) == 0


def test_builtin_has_splits_of_its_own(tokenizer: Any) -> None:
    found = tokens_of(Request("builtin"), tokenizer, quiet)
    for part, split in zip(found, ("train", "eval"), strict=True):
        wanted = tokenize(list(documents("builtin", split, tokenizer)), tokenizer)  # type: ignore[arg-type]
        assert torch.equal(part.ids.long(), wanted)


def test_made_once_and_again_when_anything_changes(
    tmp_path: Path, tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows(tmp_path / "rows.jsonl")
    before, _ = tokens_of(Request(str(path)), tokenizer, quiet)
    with monkeypatch.context() as patch:
        patch.setattr("qexport.training.tokens.documents", None)  # nothing reads the text again
        again, _ = tokens_of(Request(str(path)), tokenizer, quiet)
    assert torch.equal(before.ids, again.ids)
    assert len(list(cache.iterdir())) == 1
    path.write_text(path.read_text().replace("document 3 ", "something "))
    other, _ = tokens_of(Request(str(path)), tokenizer, quiet)
    assert not torch.equal(before.ids, other.ids)
    os.utime(path, ns=(0, 0))
    tokens_of(Request(str(path)), tokenizer, quiet)
    tokenizer.add_tokens(["docu"])
    tokens_of(Request(str(path)), tokenizer, quiet)
    assert len(list(cache.iterdir())) == 4
    assert not list(cache.glob(".making-*"))


def test_a_dataset_that_has_changed_on_the_hub(
    tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "before"

    def read(*_: Any) -> list[str]:
        return [f"{text} {number}" for number in range(99)]

    monkeypatch.setattr("qexport.training.tokens.documents", read)
    versions = iter(["a", "b", "b"])
    monkeypatch.setattr("qexport.training.tokens.hub_revision", lambda _: next(versions))
    before, _ = tokens_of(Request("some/dataset"), tokenizer, quiet)
    text = "after"
    after, _ = tokens_of(Request("some/dataset"), tokenizer, quiet)
    assert not torch.equal(before.ids, after.ids)
    text = "not read"
    again, _ = tokens_of(Request("some/dataset"), tokenizer, quiet)
    assert torch.equal(after.ids, again.ids)


def test_a_folder_of_files_is_looked_into(tmp_path: Path, tokenizer: Any) -> None:
    """As a dataset; another file in it is another text."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows(folder / "one.jsonl")
    before, _ = tokens_of(Request(str(folder), hold_out=False), tokenizer, quiet)
    rows(folder / "two.jsonl")
    after, _ = tokens_of(Request(str(folder), hold_out=False), tokenizer, quiet)
    assert len(after.ids) == 2 * len(before.ids)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokens.json", b"{"),
        ("tokens.json", b"\xff\xfe"),
        ("tokens.json", b"{}"),
        ("kept.ids", b"12"),
    ],
)
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, tokenizer: Any, cache: Path, name: str, content: bytes
) -> None:
    request = Request(str(rows(tmp_path / "rows.jsonl")))
    before = tokens_of(request, tokenizer, quiet)[0].ids.clone()
    (folder,) = cache.iterdir()
    (folder / name).write_bytes(content)
    assert torch.equal(tokens_of(request, tokenizer, quiet)[0].ids, before)
    assert json.loads((folder / "tokens.json").read_text())["kept"] == len(before)


def test_a_folder_that_is_no_dataset(tmp_path: Path, tokenizer: Any, cache: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "one.jsonl").write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises((DataError, InputError)):
        tokens_of(Request(str(folder)), tokenizer, quiet)
    with pytest.raises(InputError, match="the name of the data is empty"):
        tokens_of(Request(" "), tokenizer, quiet)
    assert not list(cache.iterdir())


def test_a_file_is_tokenized_once_for_any_number_of_steps(
    tmp_path: Path, tiny_model: Path, tokenizer: Any, cache: Path
) -> None:
    path = rows(tmp_path / "rows.jsonl")
    for steps in (1, 7, None):
        config = TrainConfig(
            tiny_model, str(path), tmp_path / "run", "2", max_length=16, max_steps=steps
        )
        load_text(config, tokenizer, quiet)
    assert len(list(cache.iterdir())) == 1


def test_without_a_cache_that_can_be_written(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("QEXPORT_CACHE", str(tmp_path / "file"))
    path = rows(tmp_path / "rows.jsonl")
    found, _ = tokens_of(Request(str(path), hold_out=False), tokenizer, quiet)
    assert (
        found.ids.tolist()
        == tokenize(list(documents(str(path), "train", tokenizer)), tokenizer).tolist()
    )


def test_a_bad_row_leaves_nothing_in_the_cache(tmp_path: Path, tokenizer: Any, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{"txt": "bad"}\n')
    with pytest.raises(DataError, match="line 2"):
        tokens_of(Request(str(path)), tokenizer, quiet)
    assert list(cache.iterdir()) == []


def test_a_dataset_is_read_as_far_as_it_is_needed(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without an end, streamed by the `datasets` library's own interface."""
    import datasets

    def endless() -> Any:
        number = 0
        while True:
            number += 1
            yield {"text": f"row {number} of very many"}

    made = datasets.IterableDataset.from_generator(endless)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    found, held = tokens_of(Request("owner/web", limit=30_000), tokenizer, quiet)
    assert 30_000 <= len(found.ids) < 30_100
    assert len(found.ids) / 30 < len(held.ids) < len(found.ids) / 10


def chats(path: Path) -> Path:
    path.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"question number {i}"},
                        {"role": "assistant", "content": f"yes {i}"},
                    ]
                }
            )
            + "\n"
            for i in range(80)
        )
    )
    return path


def test_targets_are_what_the_assistant_says(tmp_path: Path, tokenizer: Any) -> None:
    path = chats(tmp_path / "chats.jsonl")
    found, _ = tokens_of(Request(str(path), hold_out=False, replies_only=True), tokenizer, quiet)
    assert found.targets is not None
    runs: list[str] = []
    ids: list[int] = []
    for token, target in zip(found.ids.tolist(), found.targets.tolist(), strict=True):
        if target:
            ids.append(token)
        elif ids:
            runs.append(tokenizer.decode(ids))
            ids = []
    runs += [tokenizer.decode(ids)] if ids else []
    assert [run.replace("<|end|>", "").strip() for run in runs] == [f"yes {i}" for i in range(80)]


def test_windows_of_chats_and_plain_text(tmp_path: Path, tiny_model: Path, tokenizer: Any) -> None:
    """Plain text counts whole; a loss is taken of targets alone, in training and in evaluation."""
    path = chats(tmp_path / "chats.jsonl")
    config = TrainConfig(
        tiny_model,
        (str(path), "builtin"),
        tmp_path / "run",
        "2",
        group_size=32,
        max_steps=2,
        max_length=16,
        loss_on="assistant",
        precision="fp32",
        distill=0.5,
    )
    text = load_text(config, tokenizer, quiet)
    assert text.rows.targets is not None
    count = text.sizes[0]
    assert bool(text.rows.targets[count:].all())
    assert 0.1 < text.rows.targets[:count].float().mean() < 0.6
    assert text.held_out is not None and text.held_out.targets is not None
    results = train(config, Console(quiet=True))
    model = load_model(open_checkpoint(config.output), torch.float32, torch.device("cpu"))
    rows, wanted = text.held_out.tokens.long(), text.held_out.targets[:, 1:]
    with torch.no_grad():
        scores = torch.log_softmax(model(input_ids=rows).logits[:, :-1], -1)
    told = scores.gather(-1, rows[:, 1:, None])[..., 0][wanted]
    assert len({int(row.sum()) for row in wanted}) > 1  # a mean of windows' means is another
    assert results["eval_tokens"] == len(told)
    assert results["eval_loss"] == pytest.approx(-float(told.mean()), rel=1e-5)


def test_text_without_an_assistant(tmp_path: Path, tiny_model: Path, tokenizer: Any) -> None:
    path = tmp_path / "chats.jsonl"
    row = {"messages": [{"role": "user", "content": "nobody answers me"}]}
    path.write_text((json.dumps(row) + "\n") * 50)
    config = TrainConfig(
        tiny_model, str(path), tmp_path / "run", "2", max_length=16, loss_on="assistant"
    )
    with pytest.raises(DataError, match="no word of an assistant"):
        load_text(config, tokenizer, quiet)
