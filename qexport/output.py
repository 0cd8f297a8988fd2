"""Folders written whole or not at all, and only over what is ours."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qexport.errors import InputError, QexportError
from qexport.version import __version__

__all__ = [
    "MARKER",
    "atomic_folder",
    "check_writable",
    "growing_file",
    "locked",
    "mark",
    "marker",
    "ours",
    "resumable_folder",
    "strangers",
    "write_json",
]

MARKER = "qexport.json"
_FULL = ("No space left", "File too large", "quota exceeded")
# what else stands in a folder of ours while it is written, or after a kill
_WORKING = re.compile(
    r"\.?checkpoint-\d+|logs|\.(final|blocks|teacher|lock|fingerprint|journal)|"
    + re.escape(f".{MARKER}.tmp")
)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def mark(folder: Path, kind: str, files: Iterable[str] | None = None, **fields: Any) -> None:
    """Write the file that makes a folder ours, so that a later command may replace it.

    `files` are the names that we wrote; None: all that are there, in a folder that we made.
    """
    if files is None:
        files = (path.name for path in folder.iterdir() if not path.name.startswith("."))
    names = sorted({*files, MARKER})
    write_json(folder / MARKER, {"qexport": __version__, "kind": kind, "files": names, **fields})


def marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a folder of ours, or None."""
    try:
        value = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("kind"), str) else None


def ours(folder: Path) -> list[str]:
    """The names in a folder that its marker says are ours."""
    known = (marker(folder) or {}).get("files")
    return list(map(str, known)) if isinstance(known, list) else []


def strangers(folder: Path) -> list[str]:
    """What stands in a folder of ours and was not written by us: never removed."""
    names = {*ours(folder)}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in names and not _WORKING.fullmatch(path.name)
    )


def check_writable(target: Path, kind: str) -> None:
    """Raise InputError where nothing can be made at `target`, or what is there is to stay.

    An empty folder may be replaced, and a `kind` of ours.
    """
    if not target.exists() and not target.is_symlink():
        above = next(folder for folder in target.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise InputError(f"{target} cannot be made in {above}; choose another -o.")
        return
    if not target.is_dir():
        raise InputError(f"{target} is not a folder; choose another -o.")
    found = marker(target)
    if found is None and (target / MARKER).exists():
        raise InputError(f"{target}/{MARKER} is damaged; remove the folder or choose another -o.")
    if found is None and any(target.iterdir()):
        raise InputError(
            f"{target} exists and was not written by qexport; choose another -o or remove it."
        )
    if found is not None and found["kind"] != kind:
        raise InputError(
            f"{target} holds a {found['kind']} checkpoint, not a {kind} one; choose another -o."
        )
    if found is not None and kind != "run" and (theirs := strangers(target)):
        raise InputError(
            f"{target} also holds {theirs[0]}, which qexport did not write; choose another -o."
        )


@contextlib.contextmanager
def atomic_folder(target: Path, kind: str) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that takes its place when the block succeeds.

    `kind` is what the block marks it as; a folder of another kind is not replaced.
    On any error or interrupt the temporary folder is removed and `target` stays as it was.
    Raises InputError where `target` is not ours, QexportError where the disk is full or read-only.
    """
    check_writable(target, kind)
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _cannot_create(target, error) from error
    try:
        temporary.chmod(0o755)
        with disk_errors(target):
            yield temporary
            replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def resumable_folder(target: Path, kind: str, fingerprint: str) -> Iterator[Path]:
    """Like `atomic_folder`, but what a killed process has written is taken up by the next one.

    The working folder stands beside `target` under a fixed name and holds the `fingerprint` of
    what is being written; with another fingerprint it is begun anew. An error or Ctrl-C removes
    it; a kill leaves it. Hidden files in it are removed when `target` has appeared.
    Raises InputError where another process is writing to `target`.
    """
    check_writable(target, kind)
    target = target.absolute()
    working = target.with_name(f".{target.name}.packing")
    with disk_errors(target), locked(working, target):
        try:
            _begin(working, fingerprint)
            yield working
            check_writable(target, kind)  # a long time has passed
            replace_folder(working, target)
            for hidden in target.glob(".*"):
                hidden.unlink()
        except (Exception, KeyboardInterrupt):
            if (working / ".fingerprint").exists() or not any(working.glob("[!.]*")):
                shutil.rmtree(working, ignore_errors=True)
            raise


@contextlib.contextmanager
def locked(working: Path, target: Path) -> Iterator[None]:
    """Hold the lock in the folder `working`, which is made if it is not there.

    Raises InputError where another process holds it: it is writing `target`.
    """
    while True:
        try:
            working.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_create(target, error) from error
        try:
            lock = (working / ".lock").open("w")
        except FileNotFoundError:  # another process has just finished with the folder
            continue
        with lock:
            _lock(lock.fileno(), target)
            if not _same_file(lock.fileno(), working / ".lock"):
                continue  # it was the lock of a folder that has moved since
            yield
            return


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"another qexport is writing {target}; wait for it or choose another -o."
        ) from error


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


@contextlib.contextmanager
def growing_file(target: Path, fingerprint: str) -> Iterator[tuple[BinaryIO, list[bytes]]]:
    """A file of lines that appears as `target` when the block succeeds, and what it has already.

    Until then it stands beside it, under a name that the `fingerprint` of its content is part of:
    the same command goes on after the last whole line that a killed one has left. Raises InputError
    where `target` exists or another process writes it, QexportError where the disk is full or
    read-only.
    """
    if target.exists():
        raise InputError(f"{target} exists; choose another -o or remove it.")
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:12]
    part = target.absolute().with_name(f".{target.name}.{digest}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("a+b")
    except OSError as error:
        raise _cannot_create(target, error) from error
    with file, disk_errors(target):
        _lock(file.fileno(), target)
        file.seek(0)
        lines = [line for line in file.readlines() if line.endswith(b"\n")]
        file.truncate(sum(map(len, lines)))
        try:
            yield file, lines
        except BaseException:
            file.flush()
            if part.stat().st_size == 0:  # there is nothing to go on from
                part.unlink()
            raise
        file.flush()
        os.fsync(file.fileno())
        part.replace(target)


def _cannot_create(target: Path, error: OSError) -> QexportError:
    return QexportError(f"{target} cannot be created ({error.strerror}); choose another -o.")


def _begin(working: Path, fingerprint: str) -> None:
    stamp = working / ".fingerprint"
    if not stamp.exists() and any(path.name != ".lock" for path in working.iterdir()):
        raise InputError(f"{working} stands in the way and is not ours; move it away.")
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != fingerprint:
        for path in working.iterdir():
            if path.name == ".lock":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        stamp.write_text(fingerprint, encoding="utf-8")


def replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target`, moving an older `target` aside first and removing it after."""
    if not target.exists():
        new.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        target.rename(old / "old")
        new.rename(target)
    except OSError:
        if not target.exists() and (old / "old").exists():
            (old / "old").rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise QexportError(
                f"the disk is full while writing {target}; free some space or choose another -o."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise QexportError(
                f"{target} cannot be written ({error.strerror}); choose another -o."
            ) from error
        raise
    except Exception as error:  # safetensors reports the operating system's errors as its own
        if type(error).__name__ == "SafetensorError" and any(s in str(error) for s in _FULL):
            raise QexportError(
                f"the disk is full while writing {target}; free some space or choose another -o."
            ) from error
        raise
