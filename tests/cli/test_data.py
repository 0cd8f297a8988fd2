"""`qexport data generate`: a model's own text, as much as asked for, whole after a kill."""

import json
import signal
import time
from pathlib import Path

import pytest

from qexport.errors import InputError
from qexport.output import growing_file
from tests.conftest import Cli
from tests.forked_cli import Started, call


def test_so_many_tokens_of_text(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    """Documents of at most a length, by a seed; what is there already is not written over."""
    out = tmp_path / "text.jsonl"
    asked = ("data", "generate", tiny_model, "--tokens", "400", "--length", "24", "--batch", "2")
    result = cli(*asked, "-o", out)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(1 <= row["tokens"] <= 24 and isinstance(row["text"], str) for row in rows)
    assert 400 <= sum(row["tokens"] for row in rows) < 424
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]
    assert cli(*asked, "-o", out).returncode == 2
    other = tmp_path / "other.jsonl"
    assert cli(*asked, "-o", other, "--seed", "1").returncode == 0
    assert other.read_text() != out.read_text()
    longer = cli(*asked[:-4], "--length", "100000", "-o", tmp_path / "long.jsonl")
    assert longer.returncode == 2 and "more than that" in longer.stderr
    assert not list(tmp_path.glob(".*.part"))
    wrong = cli(*asked, "-o", tmp_path / "text.txt")
    assert wrong.returncode == 2 and "call it" in wrong.stderr
    run = ("--data", out, "--bits", "2", "--max-steps", "1", "--max-length", "16")
    assert cli("train", tiny_model, *run, "-o", tmp_path / "run").returncode == 0


def test_a_killed_one_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    """Whole lines stay, a torn one goes, and the file appears when it is whole."""
    out = tmp_path / "text.jsonl"
    asked = ("--tokens", "20000", "--length", "64", "--batch", "4", "-o", str(out))
    command = ["data", "generate", str(tiny_model), *asked]
    process = Started(command)
    while process.poll() is None and not any(
        part.stat().st_size > 8192 for part in tmp_path.glob(".text.jsonl.*.part")
    ):
        time.sleep(0.005)
    process.kill()
    process.said()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    (part,) = tmp_path.glob(".*.part")
    kept = [line for line in part.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert call(command).returncode == 0
    lines = out.read_text().splitlines(keepends=True)
    assert lines[: len(kept)] == kept and not list(tmp_path.glob(".*.part"))
    assert sum(json.loads(line)["tokens"] for line in lines) >= 20000


def test_a_growing_file_of_another_command_is_another(tmp_path: Path) -> None:
    target = tmp_path / "a.jsonl"
    with pytest.raises(KeyError), growing_file(target, "one") as (file, lines):
        assert lines == []
        file.write("first\né".encode()[:-1])  # a kill may tear a character
        raise KeyError
    assert not target.exists()
    with growing_file(target, "two") as (_, lines):
        assert lines == []
    target.unlink()
    with growing_file(target, "one") as (file, lines):
        assert lines == [b"first\n"]
        file.write(b"second\n")
        with pytest.raises(InputError, match="another qexport is writing"):
            growing_file(target, "one").__enter__()
    assert target.read_text() == "first\nsecond\n"
    with pytest.raises(InputError, match="exists"), growing_file(target, "one"):
        pass
