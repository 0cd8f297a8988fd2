"""Every mistake a user can make here: one sentence, the right exit code, nothing left on disk."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Cli, Runs
from tests.forked_cli import Started


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def one_sentence(stderr: str) -> str:
    """The error, which must be the only line that is one, and no traceback."""
    assert "Traceback" not in stderr, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, stderr
    return errors[0]


TRAIN = ("--max-steps", 2, "--max-length", 32)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("data", "options", "code", "message"),
    [
        ("builtin", ("--bits", "5"), 2, "'5' is not one of '1', '1.58', '2', '3', '4'"),
        ("builtin", ("--bits", "2", "--group-size", "48"), 2, "inputs of model.layers.0.self_attn"),
        ("builtin", ("--bits", "2", "--group-size", "0"), 2, "--group-size 0 is not a group"),
        ("builtin", ("--bits", "2", "--lr", "-1"), 2, "--lr -1.0 is not between 0 and 1"),
        ("builtin", ("--bits", "2", "--max-length", "1"), 2, "--max-length 1 is less than 2"),
        ("nowhere.jsonl", ("--bits", "2"), 2, "nowhere.jsonl does not exist"),
        ("empty.jsonl", ("--bits", "2"), 1, "empty.jsonl is empty"),
        ("broken.jsonl", ("--bits", "2"), 1, "broken.jsonl line 1000 is not valid JSON"),
        ("short.txt", ("--bits", "2"), 1, "fewer than one window of 32"),
        ("no/hub", ("--bits", "2"), 2, "nor a dataset that can be fetched"),
    ],
)
def test_train(
    cli: Cli,
    tiny_model: Path,
    place: Path,
    data: str,
    options: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    (place / "empty.jsonl").write_text("")
    (place / "broken.jsonl").write_text('{"text": "x"}\n' * 999 + "{\n")
    (place / "short.txt").write_text("too short")
    before = listing(place)
    result = cli("train", tiny_model, "--data", data, *TRAIN, *options, "-o", "run", cwd=place)
    assert result.returncode == code, result.stderr
    assert message in one_sentence(result.stderr)
    assert listing(place) == before
    assert result.stdout == ""


def model_copy(tiny_model: Path, place: Path) -> Path:
    shutil.copytree(tiny_model, place / "model")
    return place / "model"


def test_missing_folder(cli: Cli, place: Path) -> None:
    commands = [
        ("train", "./none", "--data", "builtin", "--bits", "2", "-o", "out"),
        ("pack", "none", "--format", "native", "-o", "out"),
        ("verify", "none", "none"),
        ("inspect", "none"),
        ("eval", "none", "--data", "builtin"),
        ("generate", "none", "-p", "x"),
        ("serve", "none", "--port", "0"),
    ]
    for command in commands:
        result = cli(*command, cwd=place)
        assert result.returncode == 2, (command, result.stderr)
        assert "none" in one_sentence(result.stderr)
        assert listing(place) == set()


@pytest.mark.parametrize("command", ["train", "inspect"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("pickle", "holds only pickle weights (pytorch_model.bin)"),
        ("truncated", "is truncated or damaged"),
        ("huge header", "claims 1152921504606846976 bytes"),
        ("no config", "has no config.json"),
        ("bad config", "is not valid JSON"),
        ("no weights", "holds no model.safetensors"),
    ],
)
def test_damaged_checkpoints(
    cli: Cli, tiny_model: Path, place: Path, command: str, damage: str, message: str
) -> None:
    model = model_copy(tiny_model, place)
    weights = model / "model.safetensors"
    if damage == "pickle":
        weights.rename(model / "pytorch_model.bin")
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "huge header":
        weights.write_bytes(struct.pack("<Q", 1 << 60) + weights.read_bytes()[8:])
    elif damage == "no config":
        (model / "config.json").unlink()
    elif damage == "bad config":
        (model / "config.json").write_text("{")
    else:
        weights.unlink()
    before = listing(place)
    arguments = ("--data", "builtin", "--bits", "2", "-o", "run") if command == "train" else ()
    result = (
        cli(command, "model", *arguments, cwd=place)
        if command == "inspect"
        else cli(command, "./model", *arguments, cwd=place)
    )
    assert result.returncode == 1, result.stderr
    assert message in one_sentence(result.stderr)
    assert listing(place) == before


def test_pack_refusals(cli: Cli, runs: Runs, tiny_model: Path, place: Path) -> None:
    run = runs("2")
    (place / "theirs").mkdir()
    (place / "theirs" / "letter.txt").write_text("dear")
    before = listing(place)
    cases = [
        ((run, "--format", "gptq", "--bits", 2, "-o", "out"), 1, "formats that hold it exactly"),
        ((run, "--format", "gguf9", "-o", "out"), 2, "is not one of native, gptq, gptq_v2"),
        ((run, "--format", "native", "-o", "theirs"), 2, "was not written by qexport"),
        ((run, "--format", "native", "-o", "theirs/letter.txt"), 2, "is not a folder"),
        ((tiny_model, "--format", "native", "-o", "out"), 2, "there is nothing to pack"),
        ((run, "--format", "native", "-o", run), 2, "is or holds the run itself"),
        ((run, "--format", "native", "-o", "/proc/out"), 1, "/proc/out cannot be created"),
    ]
    for arguments, code, message in cases:
        result = cli("pack", *arguments, cwd=place)
        assert result.returncode == code, result.stderr
        assert message.lower() in one_sentence(result.stderr).lower()
        assert listing(place) == before
    assert (place / "theirs" / "letter.txt").read_text() == "dear"


def test_a_run_is_not_packed_over_nor_a_pack_trained_over(
    cli: Cli, runs: Runs, tiny_model: Path, place: Path
) -> None:
    assert cli("pack", runs("2"), "--format", "native", "-o", place / "packed").returncode == 0
    shutil.copytree(runs("3"), place / "run")
    before = listing(place)
    result = cli("pack", runs("2"), "--format", "native", "-o", place / "run")
    assert result.returncode == 2
    assert "holds a run checkpoint, not a packed one" in one_sentence(result.stderr)
    for extra in ((), ("--no-resume",)):
        arguments = ("--data", "builtin", "--bits", "2", *TRAIN, *extra)
        result = cli("train", tiny_model, *arguments, "-o", place / "packed")
        assert result.returncode == 2
        assert "holds a packed checkpoint, not a run one" in one_sentence(result.stderr)
    assert listing(place) == before


def test_what_qexport_did_not_write_is_not_removed(
    cli: Cli, runs: Runs, tiny_model: Path, place: Path
) -> None:
    assert cli("pack", runs("2"), "--format", "native", "-o", place / "packed").returncode == 0
    (place / "packed" / "notes.txt").write_text("mine")
    result = cli("pack", runs("2"), "--format", "gptq", "-o", place / "packed")
    assert result.returncode == 2
    assert "also holds notes.txt, which qexport did not write" in one_sentence(result.stderr)
    (place / "packed" / "notes.txt").unlink()
    shutil.copytree(runs("2"), place / "packed" / "run")
    result = cli("pack", place / "packed" / "run", "--format", "native", "-o", place / "packed")
    assert result.returncode == 2
    assert "is or holds the run itself" in one_sentence(result.stderr)
    run = place / "run"
    shutil.copytree(runs("2"), run)
    shutil.copytree(tiny_model, run / "base")
    (run / "logs-of-mine.txt").write_text("mine")
    arguments = ("--data", "builtin", "--bits", "3", *TRAIN, "--no-resume", "-o", run)
    for _ in range(2):  # what the first one kept is not the second one's either
        assert cli("train", run / "base", *arguments).returncode == 0
        assert (run / "base" / "model.safetensors").exists()
        assert (run / "logs-of-mine.txt").read_text() == "mine"
    quantize = (
        "quantize",
        run / "base",
        "--method",
        "rtn",
        "--bits",
        "4",
        "--no-resume",
        "-o",
        run,
    )
    assert cli(*quantize).returncode == 0
    assert (run / "base" / "model.safetensors").exists()
    assert (run / "logs-of-mine.txt").read_text() == "mine"
    assert not (run / "report.html").exists()  # the training's own is gone with it


def test_code_in_a_checkpoint_is_never_run(cli: Cli, tiny_model: Path, place: Path) -> None:
    """Not even where someone answers yes: nobody is asked."""
    model = model_copy(tiny_model, place)
    proof = place / "proof"
    code = f"open({str(proof)!r}, 'w').write('x')\nclass C: pass\n"
    (model / "evil.py").write_text(code)
    maps = {
        "tokenizer_config.json": {"AutoTokenizer": ["evil.C", "evil.C"]},
        "config.json": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"},
    }
    for name, auto_map in maps.items():
        content = json.loads((model / name).read_text())
        extra = {"auto_map": auto_map, "attn_implementation": "evil/kernel"}
        (model / name).write_text(json.dumps({**content, **extra}))
    train = ("train", "--data", "builtin", "--bits", "2", *map(str, TRAIN), "-o", "run")
    for command in (train, ("generate", "-p", "x", "--max-tokens", "1")):
        result = cli(command[0], "./model", *command[1:], cwd=place, stdin="y\ny\ny\n")
        assert "Traceback" not in result.stderr
        assert not proof.exists()


def test_a_model_without_a_tokenizer(cli: Cli, tiny_model: Path, place: Path) -> None:
    model = model_copy(tiny_model, place)
    for path in model.glob("*token*"):
        path.unlink()
    result = cli("generate", model, "-p", "x")
    assert result.returncode == 1
    assert "has no tokenizer; copy tokenizer.json and" in result.stderr


def test_a_model_that_is_not_whole_or_diverges(cli: Cli, tiny_model: Path, place: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = model_copy(tiny_model, place)
    tensors = load_file(model / "model.safetensors")
    norm = tensors["model.norm.weight"]
    arguments = ("--data", "builtin", "--bits", "2", *TRAIN, "-o", "run")
    cases = {
        "has no model.norm.weight": None,
        "the loss is nan at step 1": torch.full_like(norm, float("nan")),
    }
    for message, value in cases.items():
        changed = {
            k: v for k, v in {**tensors, "model.norm.weight": value}.items() if v is not None
        }
        save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
        result = cli("train", "./model", *arguments, cwd=place)
        assert result.returncode == 1, result.stderr
        assert message in one_sentence(result.stderr)
        assert not (place / "run").exists()


def test_verify_ends_with_3_where_it_differs(cli: Cli, runs: Runs, place: Path) -> None:
    assert cli("pack", runs("2"), "--format", "native", "-o", place / "out").returncode == 0
    assert cli("verify", runs("2"), place / "out").returncode == 0
    result = cli("verify", runs("3"), place / "out", "--json")
    assert result.returncode == 3
    assert "is not, bit for bit" in one_sentence(result.stderr)
    assert json.loads(result.stdout)["exact"] is False


@pytest.fixture
def small_disk(tmp_path: Path) -> object:
    """A tmpfs with room for a marker and not for a model."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full(cli: Cli, runs: Runs, small_disk: Path, tiny_model: Path) -> None:
    result = cli("pack", runs("4"), "--format", "gptq", "-o", small_disk / "out")
    assert result.returncode == 1
    assert "the disk is full while writing" in one_sentence(result.stderr)
    assert listing(small_disk) == set()
    arguments = ("--data", "builtin", "--bits", "2", *TRAIN, "--save-steps", 1)
    result = cli("train", tiny_model, *arguments, "-o", small_disk / "run")
    assert result.returncode == 1, result.stderr
    assert "the disk is full while writing" in one_sentence(result.stderr)
    assert listing(small_disk) == set()


def interrupted(
    tiny_model: Path, place: Path, kind: signal.Signals, begun: str, *options: str
) -> tuple[int, str]:
    """A training that gets a signal once it has made what `begun` matches; its code and stderr."""
    arguments = ("--data", "builtin", "--bits", "2", "--max-steps", "100000", "--max-length", "32")
    command = ["train", str(tiny_model), *arguments, "--no-compile", *options, "-o", "run"]
    process = Started(command, place)
    try:
        deadline = time.monotonic() + 60
        while not list(place.glob(begun)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(kind)
        stderr = process.said(timeout=60)
    finally:
        process.kill()
    return process.wait(), stderr


@pytest.mark.parametrize(
    ("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminate"]
)
def test_an_interrupted_run_leaves_nothing(
    tiny_model: Path, place: Path, kind: signal.Signals, code: int
) -> None:
    found, stderr = interrupted(tiny_model, place, kind, "run/logs/*")
    assert found == code, stderr
    assert "Traceback" not in stderr
    assert listing(place) == set()


def test_ctrl_c_says_that_the_same_command_goes_on(tiny_model: Path, place: Path) -> None:
    """Where there is something that it goes on from."""
    found, stderr = interrupted(
        tiny_model, place, signal.SIGINT, "run/checkpoint-*", "--save-steps", "1"
    )
    assert found == 130
    assert stderr.endswith("Error: interrupted; the same command goes on with run.\n"), stderr
    assert list(place.glob("run/checkpoint-*"))


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_signal_is_not_lost_in_a_callback(kind: signal.Signals, code: int) -> None:
    """Python drops exceptions there; torch's compiler has many callbacks."""
    script = f"""
import signal, time, weakref
from qexport.cli import interrupts
from tests.forked_cli import Started

signal.signal(signal.SIGINT, signal.default_int_handler)
interrupts.install()
thing = type("Thing", (), {{}})()
reference = weakref.ref(thing, lambda _: signal.raise_signal({int(kind)}))
del thing
print("lost")
time.sleep(60)
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.stdout == "lost\n"
    assert result.returncode == code, result.stderr
    assert "ignored" not in result.stderr


def test_two_trainers_do_not_share_a_folder(cli: Cli, tiny_model: Path, place: Path) -> None:
    arguments = ("--data", "builtin", "--bits", "2", "--max-length", "32", "--max-steps", "100000")
    process = Started(["train", str(tiny_model), *arguments, "--no-compile", "-o", "run"], place)
    try:
        deadline = time.monotonic() + 60
        while not (place / "run" / ".lock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        result = cli("train", tiny_model, *arguments, "-o", "run", cwd=place)
        assert result.returncode == 2
        assert "another qexport is writing run" in one_sentence(result.stderr)
    finally:
        process.kill()
        process.said()


def test_config_files(cli: Cli, tiny_model: Path, place: Path) -> None:
    (place / "a.yaml").write_text("bits: 3\nmax-steps: 1\nmax_length: 32\ndata: builtin\n")
    flags = ("train", tiny_model, "--config", "a.yaml", "--dry-run", "-o", "run")
    assert "int3" in cli(*flags, cwd=place).stderr
    environment = {"QEXPORT_TRAIN_BITS": "4"}
    assert "int4" in cli(*flags, cwd=place, env=environment).stderr
    assert "seq2" in cli(*flags, "--bits", "2", cwd=place, env=environment).stderr
    for content, message in (
        ("bitz: 3", "bitz is not an option"),
        ("a: [", "not valid YAML"),
        ("seed: 2020-13-45", "not valid YAML"),
        ("bits: 3\nbits: 4", "bits stands twice in it"),
    ):
        (place / "a.yaml").write_text(content)
        result = cli(*flags, cwd=place)
        assert result.returncode == 2
        assert message in one_sentence(result.stderr)
    assert listing(place) == {"a.yaml"}


def test_an_option_from_the_environment_is_named_as_one(cli: Cli, tiny_model: Path) -> None:
    arguments = ("train", tiny_model, "--data", "builtin", "--bits", "2", "-o", "run")
    result = cli(*arguments, env={"QEXPORT_TRAIN_LR": "abc"})
    assert result.returncode == 2
    assert "QEXPORT_TRAIN_LR: 'abc' is not a valid float" in one_sentence(result.stderr)


def test_missing_arguments_are_named(cli: Cli, tiny_model: Path) -> None:
    arguments: tuple[object, ...] = ("train", tiny_model, "--data", "builtin")
    for missing, given in (("--output", ()), ("--bits", ("-o", "run"))):
        result = cli(*arguments, *given)
        assert result.returncode == 2
        assert f"Missing {missing}" in one_sentence(result.stderr)
    assert cli("tran").returncode == 2
