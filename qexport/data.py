"""Text: where it comes from, how it is split, and how it becomes windows of tokens."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qexport.chat import Span, render, replies
from qexport.errors import DataError, InputError, first_line

__all__ = [
    "Document",
    "Split",
    "documents",
    "is_held_out",
    "marked_documents",
    "tokenize",
    "windows",
]

Split = Literal["train", "calibration", "eval", "all"]
_AT_ONCE = 1000  # documents that are tokenized together
_DATASET_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".gz", ".zst")
_ROW_SUFFIXES = (".jsonl", ".json")


class Document(NamedTuple):
    """A text, and in a conversation the parts that the assistant has said."""

    text: str
    replies: tuple[Span, ...] | None


def documents(source: str, split: Split, tokenizer: Any) -> Iterator[str]:
    """The documents of `source`, one string each.

    source  `builtin` (the language reference that ships with CPython, split by topic 8:1:1), a
            `.jsonl` of `{"text": …}` or `{"messages": […]}` rows, a `.txt`, or a hub dataset id.
            Only `builtin` has splits of its own; of the others every document is given.

    Raises InputError for a missing file, DataError for one without text or with a bad line.
    """
    return (_row_text(row, where, tokenizer) for row, where in _rows(source, split))


def marked_documents(source: str, split: Split, tokenizer: Any) -> Iterator[Document]:
    """As `documents`, and what of conversations the assistant has said; errors as there."""
    for row, where in _rows(source, split):
        text = _row_text(row, where, tokenizer)
        is_chat = not isinstance(row.get("text"), str)
        yield Document(text, replies(row["messages"], text, tokenizer, where) if is_chat else None)


def _rows(source: str, split: Split) -> Iterator[tuple[Any, str]]:
    """Rows, and where each stands."""
    if source == "builtin":
        return (({"text": text}, source) for text in _builtin(split))
    if not source.strip():
        raise InputError("the name of the data is empty.")
    path = Path(source)
    if path.is_dir():
        beside = path / "data"
        files = [*path.iterdir(), *(beside.iterdir() if beside.is_dir() else ())]
        model = (path / "config.json").exists()
        if model or not any(file.suffix in _DATASET_SUFFIXES for file in files):
            raise InputError(f"{source} is a folder without data; give a .jsonl or a .txt file.")
        return _hub(source)
    if path.suffix == ".txt":
        return (({"text": text}, source) for text in _text_file(path))
    if path.suffix in _ROW_SUFFIXES:
        return _jsonl(path)
    if path.is_file():
        raise DataError(f"{source} is neither a .jsonl nor a .txt file; convert or rename it.")
    return _hub(source)


def is_held_out(text: str) -> bool:
    """Whether a document is kept apart: one in twenty is, by a hash of its text."""
    return _bucket(text) % 20 == 0


def tokenize(texts: Iterable[str], tokenizer: Any, limit: int | None = None) -> Tensor:
    """Token ids int64 [n] of documents in order, each ended with the tokenizer's EOS.

    No more than `limit` tokens, and little more text than they want is read.
    """
    eos = tokenizer.eos_token_id
    ids: list[int] = []
    rest = iter(texts)
    while (limit is None or len(ids) < limit) and (some := list(islice(rest, _AT_ONCE))):
        batch = tokenizer(some, add_special_tokens=False, verbose=False)
        for row in batch["input_ids"]:
            ids.extend(row)
            if eos is not None and row and row[-1] != eos:
                ids.append(eos)
    return torch.tensor(ids[:limit], dtype=torch.int64)


def windows(tokens: Tensor, length: int, option: str) -> Tensor:
    """Cut tokens [n] into whole windows [n // length, length]; what is left over is dropped.

    Raises DataError, which names the `option` that says the length, where not one comes out.
    """
    count = tokens.numel() // length
    if count == 0:
        raise DataError(
            f"the text has {tokens.numel()} tokens, fewer than one window of {length}; "
            f"give more text or a smaller {option}."
        )
    return tokens[: count * length].view(count, length)


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:4], "big")


def _builtin(split: Split) -> list[str]:
    from pydoc_data.topics import topics

    parts: dict[int, Split] = {0: "eval", 1: "calibration"}
    return [
        text
        for name, text in sorted(topics.items())
        if split in ("all", parts.get(_bucket(name) % 10, "train"))
    ]


def _text_file(path: Path) -> list[str]:
    text = _read(path).strip()
    if not text:
        raise DataError(f"{path} is empty; give a file with text.")
    return [text]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from error


def _jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    found = False
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not valid JSON ({error}); mend or remove it.") from error
        found = True
        yield row, where
    if not found:
        raise DataError(f'{path} is empty; give rows of {{"text": …}} or {{"messages": […]}}.')


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from error


def _row_text(row: object, where: str, tokenizer: Any) -> str:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        text: str = row["text"]
    elif isinstance(row, dict) and isinstance(row.get("messages"), list):
        text = render(row["messages"], tokenizer, where)
    elif isinstance(row, dict) and (key := next((k for k in ("text", "messages") if k in row), "")):
        kind = "a string" if key == "text" else "a list"
        raise DataError(f'{where}: "{key}" is not {kind}.')
    else:
        raise DataError(f'{where} has neither "text" nor "messages".')
    if not _is_unicode(text):
        raise DataError(f"{where} has half a surrogate pair, which is no character.")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def hub_revision(source: str) -> str | None:
    """Which version of a dataset the hub has now; None where it cannot be asked, or for a file."""
    if Path(source).suffix in (".txt", *_ROW_SUFFIXES):
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.partition(":")[0], timeout=10).sha
    except Exception:  # as in `_hub`, which says what is wrong where the data is wanted
        return None


def _hub(source: str) -> Iterator[tuple[Any, str]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        rows = iter(datasets.load_dataset(name, config or None, split="train", streaming=True))
    except Exception as error:  # the library raises whatever its network layer does
        raise InputError(
            f"{source} is neither builtin, a .jsonl or .txt file, nor a dataset that can be "
            f"fetched ({type(error).__name__})."
        ) from error
    found = False
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except Exception as error:  # as above, and whatever is in the files
            raise DataError(
                f"{source} cannot be read as a dataset after {number} rows "
                f"({first_line(error)}); give its .jsonl files one by one."
            ) from error
        found, number = True, number + 1
        yield row, f"{source} row {number}"
    if not found:
        raise DataError(f"{source} has no rows.")
