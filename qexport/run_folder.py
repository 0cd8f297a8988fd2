"""A run's folder: who may write to it, what a kill leaves in it, and what a finished run holds."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from qexport.checkpoint import (
    CONFIG_VERSION,
    Checkpoint,
    Modules,
    carried_files,
    modules_to_json,
)
from qexport.errors import CheckpointError, InputError
from qexport.output import check_writable, locked, mark, marker, ours, strangers, write_json
from qexport.ranks import barrier, is_main
from qexport.shards import Parts, plan_shards
from qexport.source import open_source
from qexport.stream import FileWriter

__all__ = [
    "BLOCKS",
    "DONE",
    "TEACHER",
    "claimed",
    "finished",
    "held_out_results",
    "model_state",
    "publish_run",
    "stage_run",
    "text_state",
]

BLOCKS, TEACHER = ".blocks", ".teacher"  # folders of what a resumed run need not do again
DONE = "blocks.json"  # in BLOCKS: what of it is whole
_STAGED = ".final"  # the RUN before its files get their names


def finished(run: Path, identity: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """The results of an equal run that is finished. Raises InputError over another run's folder.

    `identity` is what makes two runs equal, as it stands in the marker.
    """
    check_writable(run, "run")
    found = marker(run)
    if found is None or not resume:
        return None
    theirs = found.get("settings")
    if not isinstance(theirs, dict):
        raise CheckpointError(f"{run}/qexport.json is damaged; --no-resume starts over.")
    for key, value in identity.items():
        if theirs.get(key) != value:
            plain = not isinstance(value, (list, dict))
            how = f"{key} {theirs.get(key)!r}, now {value!r}" if plain else f"its {key} was another"
            raise InputError(
                f"{run} holds another run ({how}); choose another -o, or --no-resume to start over."
            )
    if not _is_finished(run):
        return None
    try:
        open_source(run)
        results: dict[str, Any] = json.loads((run / "all_results.json").read_text())
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(
            f"{run} was finished and is damaged ({error}); --no-resume starts over."
        ) from error
    return results


@contextlib.contextmanager
def claimed(
    run: Path, identity: dict[str, Any], *, resume: bool, progress: Callable[[Path], bool]
) -> Iterator[Path]:
    """The run folder, ours alone for the block; removed on failure while it holds no `progress`.

    Of several processes the first one claims it, and the others wait for that.
    """
    if not is_main():
        barrier()
        yield run
        return
    with locked(run, run):
        try:
            # a long time may have passed since that was asked first
            if marker(run) and finished(run, identity, resume=resume) is not None:
                raise InputError(f"{run} was finished by another process meanwhile; it is there.")
            if not resume:
                _clear(run)
            if marker(run) is None:
                mark(run, "run", (), status="begun", settings=identity)
            barrier()
            yield run
        except KeyboardInterrupt:
            if progress(run):
                raise KeyboardInterrupt(f"the same command goes on with {run}.") from None
            raise
        finally:
            if not _is_finished(run) and not progress(run):
                _clear(run)
            (run / ".lock").unlink(missing_ok=True)
            if not any(run.iterdir()):
                run.rmdir()


def _is_finished(run: Path) -> bool:
    return (marker(run) or {}).get("status") == "finished"


def _clear(run: Path) -> None:
    """Remove what we wrote into a run folder that we hold the lock of, and nothing else."""
    kept = {*strangers(run), ".lock"}
    for path in run.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def model_state(folder: Path) -> list[list[int]]:
    """By which a model is told from another of the same name: its weights, config and tokenizer."""
    weights = sorted(folder.glob("*.safetensors"))
    others = (folder / "config.json", *carried_files(folder))
    return [_state(path) for path in (*weights, *others) if path.is_file()]


def text_state(name: str) -> list[Any]:
    """By which a source of text is told from another: a file by its place, size and time."""
    path = Path(name)
    return [str(path.resolve()), _state(path)] if path.is_file() else [name, None]


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def held_out_results(loss: float, targets: int) -> dict[str, Any]:
    """What `all_results.json` says of a mean cross-entropy over so many held-out tokens."""
    perplexity = math.exp(min(loss, 700.0))
    return {"eval_loss": loss, "eval_perplexity": perplexity, "eval_tokens": targets}


def stage_run(
    run: Path,
    source: Checkpoint,
    modules: Modules,
    parts: Parts,
    tensors: Iterable[tuple[str, Tensor]],
    results: dict[str, Any],
    files: Mapping[str, Any],
    form: Literal["latent", "codes"] = "latent",
) -> Path:
    """Write the RUN into a folder of its own beside its checkpoints, and return that folder.

    `tensors` are those that `parts` promises; none is kept once it is written. `files` are JSON by
    name, and `form` is how quantized weights are written. `publish_run` makes it the run's.
    """
    staging = run / _STAGED
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    shards, index = plan_shards(parts)
    with FileWriter(staging, shards) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
    for name, content in index.items():
        write_json(staging / name, content)
    source.copy_files(staging)
    evaluation = {key: value for key, value in results.items() if key.startswith("eval_")}
    written = {"all_results.json": results, **files}
    if evaluation:
        written["eval_results.json"] = evaluation
    for name, content in written.items():
        write_json(staging / name, content)
    quantization = {
        "quant_method": "qexport",
        "format": form,
        "version": CONFIG_VERSION,
        "config_groups": modules_to_json(modules),
    }
    added = {"quantization_config": quantization} if modules else {}
    write_json(staging / "config.json", {**source.config, **added})
    return staging


def publish_run(run: Path, identity: dict[str, Any]) -> None:
    """Move what was staged into the run's folder and mark it finished.

    A kill at any point leaves either a finished run or all that the same command goes on from: the
    marker names the files before they come, and what was worked with is removed after it says that
    the run is finished.
    """
    staging = run / _STAGED
    files = sorted(staging.iterdir(), key=lambda path: path.name == "config.json")
    names = {path.name for path in files} | set(ours(run))
    mark(run, "run", names, status="begun", settings=identity)
    for file in files:  # config.json, which makes it readable, comes last
        file.replace(run / file.name)
    staging.rmdir()
    mark(run, "run", names, status="finished", settings=identity)
    for name in (BLOCKS, TEACHER):
        shutil.rmtree(run / name, ignore_errors=True)
