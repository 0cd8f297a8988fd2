"""`qexport serve --backend vllm`: its options, and what they come to."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qexport.cli.common import progress_console
from qexport.errors import InputError

__all__ = ["VllmChoice", "serve_with_vllm", "vllm_options"]

# what only our server has
_NATIVE = {
    "limits": "--limit",
    "log_json": "--log-json",
    "log_prompts": "--log-prompts",
    "allowed_host": "--allowed-host",
    "cors_origin": "--cors-origin",
    "kernel": "--kernel",
    "head_bits": "--head-bits",
    "cache": "--kv-cache",
    "threads": "--threads",
}
_NAMES = ("tensor_parallel", "pipeline_parallel", "data_parallel", "vllm_arg")
_COUNT = click.IntRange(1, 1024)
_OPTIONS = (
    click.option(
        "--backend",
        type=click.Choice(["native", "vllm"]),
        default="native",
        show_default=True,
        help="Who runs the model: qexport, or vLLM with qexport as its plugin.",
    ),
    click.option(
        "--tensor-parallel", type=_COUNT, default=1, help="vLLM: devices that share every layer."
    ),
    click.option(
        "--pipeline-parallel", type=_COUNT, default=1, help="vLLM: devices with some layers each."
    ),
    click.option("--data-parallel", type=_COUNT, default=1, help="vLLM: copies of the model."),
    click.option(
        "--vllm-arg", multiple=True, metavar="ARG", help="vLLM: passed on as it is; repeatable."
    ),
)


@dataclass(frozen=True)
class VllmChoice:
    """Whether vLLM serves, and how it is spread."""

    chosen: bool
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    vllm_arg: tuple[str, ...]


def vllm_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options; the command gets them as `vllm`."""

    @wraps(command)
    def gathered(backend: str, **arguments: Any) -> None:
        chosen = backend == "vllm"
        for name in _NAMES:
            if not chosen and _is_given(name):
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} is vLLM's; add --backend vllm.")
        values = {name: arguments.pop(name) for name in _NAMES}
        command(**arguments, vllm=VllmChoice(chosen, **values))

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return gathered


def serve_with_vllm(
    path: Path,
    name: str,
    keys: list[str],
    address: tuple[str, int],
    slots: int,
    serving: dict[str, Any],
    vllm: VllmChoice,
) -> None:
    """Check first, and then run vLLM's own server until it ends."""
    for option, flag in _NATIVE.items():
        if _is_given(option):
            raise InputError(f"{flag} is of the native backend; vLLM's own go into --vllm-arg.")
    if len(keys) > 1:
        raise InputError("--backend vllm takes one API key.")
    from qexport.runtime.vllm_server import (
        VllmOptions,
        preflight,
        run_vllm,
        vllm_command,
        vllm_version,
    )

    version = vllm_version()
    console = progress_console()
    for line in preflight(path, serving["dtype"]):
        console.print(line, highlight=False, soft_wrap=True)
    host, port = address
    options = VllmOptions(
        host=host,
        port=port,
        name=name,
        dtype=serving["dtype"],
        context=serving["context"],
        slots=slots if _is_given("slots") else None,
        tensor_parallel=vllm.tensor_parallel,
        pipeline_parallel=vllm.pipeline_parallel,
        data_parallel=vllm.data_parallel,
        arguments=vllm.vllm_arg,
    )
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def ready() -> None:
        line = f"serving {name} at {url}/v1 by vLLM {version}"
        console.print(line, highlight=False, soft_wrap=True)

    run_vllm(vllm_command(path, options), keys[0] if keys else None, url, ready)


def _is_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, ParameterSource.DEFAULT)
