"""Packing in a stream: shards, kills, hashes, and what stays in memory."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qexport.checkpoint import Checkpoint, Entry
from qexport.errors import InputError, VerificationError
from qexport.formats import FORMATS, Options, open_checkpoint
from qexport.formats import pack as pack_module
from qexport.formats.pack import pack
from qexport.formats.verify import compare, verify
from qexport.shards import Parts, ShardReader, plan_shards
from qexport.stream import FileWriter
from tests.conftest import Cli, Runs
from tests.formats.models import decoder_layer


def counting(source: Checkpoint, read: list[str], stop_after: int | None) -> Checkpoint:
    """The same checkpoint, noting what is read, and exiting as a killed process would."""

    def load(name: str, entry: Entry) -> object:
        if stop_after is not None and len(read) >= stop_after:
            raise SystemExit(143)  # what SIGTERM makes of the command
        read.append(name)
        return entry.load()

    entries = {
        name: Entry(
            entry.shape,
            entry.dtype,
            lambda n=name, e=entry: load(n, e),  # type: ignore[misc, arg-type]
            entry.scheme,
            entry.stored_bytes,
        )
        for name, entry in source.entries.items()
    }
    return Checkpoint(source.folder, source.layout, source.config, entries)


@pytest.mark.parametrize("form", ["native", "gptq", "compressed-tensors", "gguf"])
def test_a_killed_pack_goes_on(
    runs: Runs, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "_SYNC_BYTES", 1)  # every tensor is on the disk at once
    source = open_checkpoint(runs("2"))
    first: list[str] = []
    with pytest.raises(SystemExit):
        pack(counting(source, first, 9), FORMATS[form], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.packing").is_dir()
    second: list[str] = []
    report = pack(counting(source, second, None), FORMATS[form], tmp_path / "out")
    assert report.exact
    assert not set(first) & set(second)
    assert set(first) | set(second) == set(source)
    assert sorted(report.source_sha256) == sorted(source)
    assert verify(source, open_checkpoint(tmp_path / "out")).exact
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob(".*"))
    whole = pack(source, FORMATS[form], tmp_path / "again")
    assert whole.to_json() == report.to_json()


def test_another_source_begins_anew(runs: Runs, tmp_path: Path) -> None:
    first: list[str] = []
    with pytest.raises(SystemExit):
        pack(counting(open_checkpoint(runs("2")), first, 9), FORMATS["native"], tmp_path / "out")
    other = open_checkpoint(runs("3"))
    second: list[str] = []
    assert pack(counting(other, second, None), FORMATS["native"], tmp_path / "out").exact
    assert set(second) == set(other)


def test_a_torn_journal_is_read_to_its_tear(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "_SYNC_BYTES", 1)
    source = open_checkpoint(runs("2"))
    first: list[str] = []
    with pytest.raises(SystemExit):
        pack(counting(source, first, 9), FORMATS["native"], tmp_path / "out")
    journal = tmp_path / ".out.packing" / ".journal"
    last = journal.read_text().splitlines()[-1]
    (torn,) = [name for name in first if f'"{name}"' in last]  # two at a time end in any order
    journal.write_bytes(journal.read_bytes()[:-20])
    second: list[str] = []
    with pytest.raises(SystemExit):  # killed again: what is written now is read, too
        pack(counting(source, second, 5), FORMATS["native"], tmp_path / "out")
    assert torn in second[:2]
    third: list[str] = []
    assert pack(counting(source, third, None), FORMATS["native"], tmp_path / "out").exact
    assert not set(third) & {*first, *second}


def test_sigkill_of_the_command(cli: Cli, runs: Runs, tmp_path: Path) -> None:
    """Killed anywhere: no folder, and the same command makes it."""
    run = runs("4")
    command = [sys.executable, "-m", "qexport", "pack", str(run), "--format", "gguf", "-o", "out"]
    for wait in (0.5, 2.0, 2.6, 3.2):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "out").exists():  # it was done before
            break
    result = cli("pack", run, "--format", "gguf", "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert cli("verify", run, tmp_path / "out").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_packers_do_not_share_a_folder(runs: Runs, tmp_path: Path) -> None:
    source = open_checkpoint(runs("2"))

    class Meanwhile(Checkpoint):
        def __getitem__(self, name: str) -> object:  # type: ignore[override]
            with pytest.raises(InputError, match="another qexport is writing"):
                pack(source, FORMATS["gptq"], tmp_path / "out")
            return super().__getitem__(name)

    first = Meanwhile(source.folder, source.layout, source.config, source.entries)
    assert pack(first, FORMATS["native"], tmp_path / "out").exact


def test_a_header_cut_short_by_a_kill_is_written_again(runs: Runs, tmp_path: Path) -> None:
    source = open_checkpoint(runs("2"))
    first: list[str] = []
    with pytest.raises(SystemExit):
        pack(counting(source, first, 0), FORMATS["native"], tmp_path / "out")
    (tmp_path / ".out.packing" / "model.safetensors").write_bytes(b"")
    assert pack(source, FORMATS["native"], tmp_path / "out").exact


def test_what_is_not_ours_is_left_alone(runs: Runs, tmp_path: Path) -> None:
    source = open_checkpoint(runs("2"))
    (tmp_path / ".out.packing").mkdir()
    (tmp_path / ".out.packing" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="stands in the way"):
        pack(source, FORMATS["native"], tmp_path / "out")
    assert (tmp_path / ".out.packing" / "thesis.tex").read_text() == "mine"

    class Meanwhile(Checkpoint):
        def __getitem__(self, name: str) -> object:  # type: ignore[override]
            (tmp_path / "other").mkdir(exist_ok=True)
            (tmp_path / "other" / "thesis.tex").write_text("mine")
            return super().__getitem__(name)

    late = Meanwhile(source.folder, source.layout, source.config, source.entries)
    with pytest.raises(InputError, match="was not written by qexport"):
        pack(late, FORMATS["native"], tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").read_text() == "mine"


def test_a_record_is_judged_by_its_own_promise(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor that reads back otherwise is enough, with leave to round embeddings too."""
    source = open_checkpoint(runs("4"))
    honest = compare

    def otherwise(name: str, mine: object, theirs: object) -> object:
        if name == "model.norm.weight" and isinstance(theirs, torch.Tensor):
            theirs = theirs + 1
        return honest(name, mine, theirs)  # type: ignore[arg-type]

    monkeypatch.setattr(pack_module, "compare", otherwise)
    options = Options(embeddings="q8_0", allow_lossy=True)
    with pytest.raises(VerificationError, match=r"first in model\.norm\.weight"):
        pack(source, FORMATS["gguf"], tmp_path / "out", options)
    assert not any(tmp_path.iterdir())


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Path]:
    """Three tensors of 4,000 bytes in shards of 5,000."""
    parts: Parts = dict.fromkeys("abc", (torch.float32, (10, 100)))
    files, index = plan_shards(parts, 5000)
    with FileWriter(tmp_path, files) as writer:
        for value, name in enumerate(parts):
            writer.write(name, torch.full((10, 100), float(value)))
    for name, content in index.items():
        (tmp_path / name).write_text(json.dumps(content))
    yield tmp_path


def test_shards_are_planned(shards: Path) -> None:
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    reader = ShardReader(shards)
    for value, name in enumerate("abc"):
        assert bool((reader.tensor(name) == value).all())


@pytest.mark.parametrize("form", ["native", "gptq", "awq", "compressed-tensors", "humming"])
def test_sharded_in_and_out(
    runs: Runs, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qexport.shards.plan_shards.__defaults__", (50_000,))
    source = open_checkpoint(runs("2"))
    pack(source, FORMATS["native"], tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    sharded = open_checkpoint(tmp_path / "shards")
    pack(sharded, FORMATS[form], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert verify(source, open_checkpoint(tmp_path / "out")).exact


def test_hashes_are_of_the_source(tiny_model: Path, tmp_path: Path) -> None:
    source = decoder_layer(tiny_model, "uint4", 64, 32)
    report = pack(source, FORMATS["native"], tmp_path / "out")
    norm = source.dense("model.norm.weight")
    digest = hashlib.sha256(norm.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert report.source_sha256["model.norm.weight"] == digest
    name = "model.layers.0.mlp.up_proj.weight"
    held = source.quantized(name)
    assert held.zeros is not None
    parts = [json.dumps(held.scheme.to_json()).encode()]
    parts += [t.view(torch.uint8).numpy().tobytes() for t in (held.codes, held.scales, held.zeros)]
    assert report.source_sha256[name] == hashlib.sha256(b"".join(parts)).hexdigest()
    assert json.loads((tmp_path / "out" / "qexport.json").read_text())["source_sha256"] == (
        report.source_sha256
    )


@pytest.mark.slow
def test_memory_is_one_tensor_and_its_output(tiny_model: Path, tmp_path: Path) -> None:
    """24 matrices of 16 MiB of codes each: far less than the 384 MiB of all is ever held."""
    from tests.formats.models import checkpoint, tensor

    layers = {f"m{i}.weight": tensor("int8", 4096, 4096, 128, i) for i in range(24)}
    pack(checkpoint(tiny_model, dict(layers)), FORMATS["native"], tmp_path / "source")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from qexport.formats import FORMATS, open_checkpoint\n"
        "from qexport.formats.pack import pack\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "source = open_checkpoint(Path(sys.argv[1])); source['m0.weight']; before = peak()\n"
        "pack(source, FORMATS['compressed-tensors'], Path(sys.argv[2])); print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert int(result.stdout) < 200 * 1024
