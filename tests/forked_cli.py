"""The command line in a process of its own, forked from one that has imported what is heavy.

Every call is a process with its own exit code, files and memory, as a user's is; only the seconds
of importing torch and transformers are spared. `multiprocessing`'s fork server runs no threads.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["call"]

_PRELOADED = [
    *("torch", "transformers", "safetensors.torch", "datasets", "accelerate", "rich.progress"),
    *("torch.utils.tensorboard", "transformers.models.llama.modeling_llama"),
    *("qexport.training", "qexport.evaluate", "qexport.formats.pack", "qexport.formats.verify"),
    "qexport.runtime.serving",
]
_SECONDS = 300


def call(
    arguments: list[str], cwd: Path | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `qexport` with these arguments; what `subprocess.run` would give."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("in", "out", "err")]
        files[0].write_text(stdin or "")
        where = str(cwd or Path.cwd())
        process = context.Process(
            target=_run, args=(arguments, where, dict(os.environ), list(map(str, files)))
        )
        process.start()
        process.join(_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, _SECONDS)
        out, err = (file.read_text() for file in files[1:])
        code = process.exitcode
        process.close()
    assert code is not None
    return subprocess.CompletedProcess(arguments, code, out, err)


def _run(arguments: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> None:
    """In the child: a user's standard files, folder and environment, and then `main`."""
    for number, (file, flags) in enumerate(
        zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)
    ):
        descriptor = os.open(file, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["qexport", *arguments]
    from qexport.cli import main

    main()
