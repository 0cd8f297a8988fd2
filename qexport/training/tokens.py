"""Tokens of a source, made once and kept on disk: a corpus passes through, and is mapped.

They stand in `$QEXPORT_CACHE/tokens`, under a digest of the source's state, the tokenizer and what
is asked for. Documents follow each other, each ended with the tokenizer's EOS.
"""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from qexport.cache import cache_folder
from qexport.data import Document, Split, documents, hub_revision, is_held_out, marked_documents
from qexport.errors import DataError, QexportError
from qexport.output import write_json

__all__ = ["Request", "Tokens", "tokens_of"]

_BATCH = 500  # documents that are tokenized at a time
_TELL = 10_000_000  # tokens
_LAYOUT = 1  # of the files


@dataclass(frozen=True)
class Request:
    """What of a source is asked for.

    hold_out       keep one document of twenty apart; of `builtin`, its own split
    replies_only   mark what the assistant says in conversations: the rest is no target
    limit          tokens after which no more is read
    """

    source: str
    split: Split = "train"
    hold_out: bool = True
    replies_only: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class Tokens:
    """ids int32 [n], and bool [n] of those that are targets of training; None for all."""

    ids: Tensor
    targets: Tensor | None


def tokens_of(
    request: Request, tokenizer: Any, tell: Callable[[str], None]
) -> tuple[Tokens, Tokens]:
    """What is trained on, and what is held out; from the cache where it is there.

    `tell` is given news of long work. Raises InputError or DataError as `documents` does, and
    where the tokenizer cannot say which characters a token stands for, if that is needed.
    """
    if request.replies_only and not tokenizer.is_fast:
        raise DataError(f"{request.source}: --loss-on assistant wants a fast tokenizer.")
    folder = cache_folder("tokens") / _digest(request, tokenizer)
    if folder.exists():
        try:
            return _mapped(folder, request)
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(folder, ignore_errors=True)  # damaged: it is made again
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        above: Path | None = folder.parent
        working = Path(tempfile.mkdtemp(prefix=".making-", dir=above))
    except OSError:  # no cache, then: mapped files outlive their names
        above, working = None, Path(tempfile.mkdtemp(prefix="qexport-tokens-"))
    try:
        try:
            _write(request, tokenizer, working, tell)
        except OSError as error:
            raise QexportError(
                f"tokens cannot be kept in {working.parent} ({error.strerror}); free some space, "
                "or set QEXPORT_CACHE to another folder."
            ) from error
        if above is not None and not folder.exists():
            try:
                working.rename(folder)
            except OSError:  # another process was first
                return _mapped(working, request)
            return _mapped(folder, request)
        return _mapped(working, request)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _digest(request: Request, tokenizer: Any) -> str:
    """Of everything that the tokens depend on."""
    path = Path(request.source)
    state: list[Any] = [asdict(request), _LAYOUT]
    if path.exists():
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [(str(file.resolve()), file.stat()) for file in files]
        state += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    elif request.source == "builtin":
        from platform import python_version

        state.append(python_version())
    else:  # a dataset of the hub; without a network, that which was read last
        state.append(hub_revision(request.source))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if backend is None else backend.to_str()
    state += [words, str(tokenizer.chat_template), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _mapped(folder: Path, request: Request) -> tuple[Tokens, Tokens]:
    sizes = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    kept, held = (
        Tokens(
            _map(folder / f"{part}.ids", sizes[part], torch.int32),
            _map(folder / f"{part}.targets", sizes[part], torch.bool)
            if request.replies_only
            else None,
        )
        for part in ("kept", "held")
    )
    return kept, held


def _map(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    if path.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{path} is not whole")
    if size == 0:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype)


class _Part:
    """Tokens that are written as they come; targets only where some are not."""

    def __init__(self, folder: Path, name: str, *, targets: bool) -> None:
        self.count = 0
        self._ids: BinaryIO = (folder / f"{name}.ids").open("wb")
        self._targets = (folder / f"{name}.targets").open("wb") if targets else None

    def add(self, ids: list[int], targets: list[bool]) -> None:
        self.count += len(ids)
        self._ids.write(np.asarray(ids, dtype="<i4").tobytes())
        if self._targets is not None:
            self._targets.write(np.asarray(targets, dtype=np.bool_).tobytes())

    def close(self) -> None:
        self._ids.close()
        if self._targets is not None:
            self._targets.close()


def _write(request: Request, tokenizer: Any, folder: Path, tell: Callable[[str], None]) -> None:
    parts = [_Part(folder, name, targets=request.replies_only) for name in ("kept", "held")]
    kept, held = parts
    told = 0
    try:
        for document, ids, targets in _tokenized(_documents(request, tokenizer), tokenizer):
            apart = request.hold_out and request.source != "builtin" and is_held_out(document.text)
            (held if apart else kept).add(ids, targets)
            if kept.count - told >= _TELL:
                told = kept.count
                tell(f"{request.source}: {told:,} tokens")
            if request.limit is not None and kept.count >= request.limit:
                break
        if request.hold_out and request.source == "builtin":
            asked = Request("builtin", "eval", replies_only=request.replies_only)
            for _, ids, targets in _tokenized(_documents(asked, tokenizer), tokenizer):
                held.add(ids, targets)
    finally:
        for part in parts:
            part.close()
    write_json(folder / "tokens.json", {"kept": kept.count, "held": held.count})


def _documents(request: Request, tokenizer: Any) -> Iterator[Document]:
    if request.replies_only:
        return marked_documents(request.source, request.split, tokenizer)
    found = documents(request.source, request.split, tokenizer)
    return (Document(text, None) for text in found)


def _tokenized(
    found: Iterator[Document], tokenizer: Any
) -> Iterator[tuple[Document, list[int], list[bool]]]:
    """Each document's tokens, and which of them are targets."""
    eos = tokenizer.eos_token_id
    while batch := list(itertools.islice(found, _BATCH)):
        needs = any(document.replies is not None for document in batch)
        made = tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            return_offsets_mapping=needs,
            verbose=False,
        )
        for index, document in enumerate(batch):
            ids = list(made["input_ids"][index])
            targets = [True] * len(ids)
            if document.replies is not None:
                targets = _within(made["offset_mapping"][index], document.replies)
            if eos is not None and ids and ids[-1] != eos:
                ids.append(eos)
                targets.append(document.replies is None)
            yield document, ids, targets


def _within(offsets: list[tuple[int, int]], spans: tuple[tuple[int, int], ...]) -> list[bool]:
    return [any(start <= begin < end for start, end in spans) for begin, _ in offsets]
