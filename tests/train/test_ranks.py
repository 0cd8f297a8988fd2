"""Several processes train what one trains: DDP and FSDP2 over gloo, saved and resumed by one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qexport.errors import InputError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.training.zero import configuration
from tests.conftest import Cli
from tests.oracle.marks import FOLDER, NEEDS_ENVIRONMENT

STEPS = 12
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}


def options(output: Path, batch_size: int) -> list[str]:
    settings = {
        **{"--data": "builtin", "--bits": "2", "--group-size": "32", "--max-steps": str(STEPS)},
        **{"--max-length": "64", "--precision": "fp32", "--lr": "1e-3", "--save-steps": "4"},
        **{
            "--batch-size": str(batch_size),
            "--distill": "0.5",
            "--block-epochs": "1",
            "--block-compensated": "4",
        },
        **{"--block-windows": "8", "--log-steps": "1", "-o": str(output)},
    }
    return [part for pair in settings.items() for part in pair]


def launcher(processes: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, "--nproc-per-node", str(processes), "--master-port", str(port)]


def torchrun(processes: int, *arguments: object) -> list[str]:
    return [*launcher(processes), "-m", "qexport", *map(str, arguments)]


def kill_all(run: Path) -> None:
    """Kill -9 everything that names this run: a launcher's children have sessions of their own."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(run) in (folder / "cmdline").read_text() and int(folder.name) != os.getpid():
                os.kill(int(folder.name), signal.SIGKILL)


def train_until_saved(run: Path, command: list[str], environment: dict[str, str]) -> None:
    """Start a training, and kill all of it once it has a checkpoint."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    while process.poll() is None and not list(run.glob("checkpoint-*")):
        time.sleep(0.002)
    kill_all(run)
    process.wait()
    assert not (run / "config.json").exists(), "it was too fast to be killed"


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "qexport", "train", str(tiny_model), *options(run, 4)]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    return run


@pytest.mark.parametrize(
    "extra",
    [(), ("--shard",), ("--shard", "--gradient-checkpointing"), ("--shard", "--offload")],
)
def test_two_processes_train_what_one_does(
    tiny_model: Path, alone: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    """Loss by loss, the same steps; what they write packs exactly, and is told once."""
    run = tmp_path / "run"
    command = torchrun(2, "train", tiny_model, *options(run, 2), *extra, "--json")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["tokens"] == STEPS * 4 * 64
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(alone), abs=1e-3)
    assert pack(open_checkpoint(run), FORMATS["native"], tmp_path / "packed").exact


ENDING = """
import atexit
from qexport import ranks

class Kept:
    def __del__(self):
        print(" finalized ", end="")

kept = Kept()
atexit.register(print, " atexit ", end="")
ranks.join()
print(" before ", end="")
ranks.leave()
print(" after ", end="")
"""


@pytest.mark.parametrize(
    ("processes", "said"),
    [(1, ["after", "atexit", "before", "finalized"]), (2, ["atexit", "before"])],
)
def test_of_several_processes_none_takes_python_down(
    tmp_path: Path, processes: int, said: list[str]
) -> None:
    """There gloo's threads abort it, now and then; what was said and asked for is done before."""
    program = tmp_path / "program.py"
    program.write_text(ENDING)
    done = subprocess.run(
        [*launcher(processes), str(program)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    # those of two processes mix, and each print is one write
    assert sorted(done.stdout.split()) == sorted(processes * said)


def deepspeed() -> tuple[list[str], dict[str, str]]:
    """Options and environment of a training by ZeRO-2, on CPUs."""
    folder = str(FOLDER / "deepspeed")
    path = Path(__file__).parent.parent.parent / "examples" / "zero2.json"
    programs = f"{FOLDER / 'bin'}{os.pathsep}{os.environ['PATH']}"  # ninja
    environment = {**ENVIRONMENT, "PYTHONPATH": folder, "PATH": programs, "DS_ACCELERATOR": "cpu"}
    return ["--deepspeed", str(path)], environment


@NEEDS_ENVIRONMENT
@pytest.mark.parametrize("others", [2, 1])
def test_deepspeed_trains_what_one_process_does(
    tiny_model: Path, alone: Path, tmp_path: Path, others: int
) -> None:
    """Moments are in parts; killed, it goes on, or one process does without it."""
    run, (extra, environment) = tmp_path / "run", deepspeed()
    command = torchrun(2, "train", tiny_model, *options(run, 2), *extra)
    train_until_saved(run, command, environment)
    (saved,) = run.glob("checkpoint-*")
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}
    if others == 1:
        command = [sys.executable, "-m", "qexport", "train", str(tiny_model), *options(run, 4)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "resuming from checkpoint-" in done.stderr
    assert losses(run) == pytest.approx(losses(alone), abs=1e-3)
    assert pack(open_checkpoint(run), FORMATS["native"], tmp_path / "packed").exact


def test_the_example_for_accelerate_is_one_that_it_takes() -> None:
    """Read by accelerate itself; it starts several processes on GPUs alone, and there is none."""
    from accelerate.commands.config.config_args import load_config_from_file

    example = Path(__file__).parent.parent.parent / "examples" / "accelerate-ddp.yaml"
    found = load_config_from_file(str(example))
    assert (found.distributed_type.value, found.num_processes) == ("MULTI_GPU", 8)
    assert found.mixed_precision == "no"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", 'has no "zero_optimization"'),
        ('{"zero_optimization": {"stage": 3}}', "is not of stage 1 or 2"),
        ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', "leave out 'bf16'"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {}}', "leave out 'optimizer'"),
    ],
)
def test_configurations_of_deepspeed_that_will_not_do(
    tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "zero.json"
    path.write_text(content)
    with pytest.raises(InputError, match=said):
        configuration(path, batch_size=2, gradient_accumulation=1, bf16=True)


@pytest.mark.parametrize("extra", [(), ("--shard",)])
def test_one_process_goes_on_where_two_were_killed(
    tiny_model: Path, alone: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    """Masters, moments and the place in the text are those of the whole."""
    run = tmp_path / "run"
    command = torchrun(2, "train", tiny_model, *options(run, 2), *extra)
    train_until_saved(run, command, ENVIRONMENT)
    command = [sys.executable, "-m", "qexport", "train", str(tiny_model), *options(run, 4)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "resuming from checkpoint-" in done.stderr
    assert losses(run) == pytest.approx(losses(alone), abs=1e-3)
    assert pack(open_checkpoint(run), FORMATS["native"], tmp_path / "packed").exact


def test_mistakes_in_a_sentence(tiny_model: Path, tmp_path: Path, cli: Cli) -> None:
    for said, *extra in (
        ("--shard wants several processes", "--shard"),
        ("--offload goes with --shard", "--offload"),
        ("--deepspeed wants torchrun", "--deepspeed", "zero.json"),
    ):
        result = cli("train", tiny_model, *options(tmp_path / "run", 4), *extra)
        assert result.returncode == 2 and said in result.stderr


def test_where_one_process_fails_the_others_say_so(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"txt": 1}\n')
    asked = ("train", tiny_model, *options(tmp_path / "run", 2), "--data", data)
    result = subprocess.run(
        torchrun(2, *asked), capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert any('neither "text" nor "messages"' in line for line in said), result.stderr
    assert "[rank1]: Traceback" not in result.stderr, result.stderr
