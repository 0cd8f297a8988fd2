from pathlib import Path

import pytest

from qexport.errors import InputError, QexportError
from qexport.output import (
    atomic_folder,
    check_writable,
    mark,
    marker,
    resumable_folder,
    strangers,
)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_folder(target, "packed") as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "out", "packed") as folder:
        (folder / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_result(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target, "packed") as folder:
        mark(folder, "packed", round=1)
    with pytest.raises(RuntimeError), atomic_folder(target, "packed") as folder:
        mark(folder, "packed", round=2)
        raise RuntimeError
    found = marker(target)
    assert found is not None
    assert found["round"] == 1
    with atomic_folder(target, "packed") as folder:
        mark(folder, "packed", round=3)
    assert (marker(target) or {})["round"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_another_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("x")
    with (
        pytest.raises(InputError, match="was not written by qexport"),
        atomic_folder(target, "packed"),
    ):
        pass
    assert (target / "thesis.tex").read_text() == "x"
    with (
        pytest.raises(InputError, match="is not a folder"),
        atomic_folder(target / "thesis.tex", "packed"),
    ):
        pass


def test_what_cannot_be_made_is_found_before(tmp_path: Path) -> None:
    """A long job asks first."""
    (tmp_path / "file").write_text("x")
    check_writable(tmp_path / "a" / "b", "packed")
    for target in (tmp_path / "file" / "out", Path("/proc/1/none/out")):
        with pytest.raises(InputError, match=r"cannot be made in .*; choose another -o"):
            check_writable(target, "packed")


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with atomic_folder(target, "packed") as folder:
        mark(folder, "packed")
    assert marker(target) is not None


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(QexportError, match="the disk is full while writing"),
        atomic_folder(tmp_path / "out", "packed"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_what_others_wrote_is_told_apart(tmp_path: Path) -> None:
    for name in ("ours", "theirs", "logs-of-mine", "checkpoint-notes"):
        (tmp_path / name).write_text("x")
    for name in ("logs", "checkpoint-12", ".blocks"):
        (tmp_path / name).mkdir()
    mark(tmp_path, "run", ("ours",))
    assert strangers(tmp_path) == ["checkpoint-notes", "logs-of-mine", "theirs"]


def test_a_kill_at_the_end_leaves_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is whole when it is renamed; what was worked with may stay, and is no matter."""
    target = tmp_path / "out"

    def write(content: str) -> None:
        with resumable_folder(target, "packed", content) as folder:
            (folder / "a").write_text(content)
            mark(folder, "packed")

    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == ".fingerprint":
            raise SystemExit
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(SystemExit):
        write("first")
    monkeypatch.undo()
    assert (target / "a").read_text() == "first"
    write("second")
    assert sorted(path.name for path in target.iterdir()) == ["a", "qexport.json"]
    assert (target / "a").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
