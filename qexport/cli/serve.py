"""`qexport serve`."""

import errno
import socket
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qexport.cli.common import Command, progress_console
from qexport.cli.serve_vllm import VllmChoice, serve_with_vllm, vllm_options
from qexport.cli.serving import serving_options
from qexport.errors import InputError

if TYPE_CHECKING:
    from qexport.runtime.server import Limits, RequestLog

_EPILOG = """\b
Examples:
  qexport serve packed
  qexport serve packed --host 0.0.0.0 --api-key "$KEY"
  qexport serve packed --limit queue=64 --limit body=1000000 --log-json requests.jsonl
  qexport serve packed --backend vllm --tensor-parallel 2
  curl localhost:8000/v1/models

\b
Limits: queue, body, choices, stops, stop_length, logprobs, headers, connections,
receive_seconds, send_seconds, idle_seconds, stall_seconds, drain_seconds."""

_HERE = ("127.0.0.1", "localhost", "::1")


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--api-key", "keys", multiple=True, help="A key that clients may send; repeatable.")
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with a key on each line; lines that begin with # are none.",
)
@click.option("--insecure", is_flag=True, help="Serve other machines without a key.")
@click.option("--allowed-host", multiple=True, help="A name that requests may be for; repeatable.")
@click.option("--cors-origin", multiple=True, help="A site whose pages may ask; repeatable.")
@click.option("--served-model-name", help="Name that requests use; default the folder's.")
@click.option(
    "--slots",
    default=8,
    show_default=True,
    type=click.IntRange(1, 256),
    help="Requests that run at a time; others wait.",
)
@click.option("--limit", "limits", multiple=True, metavar="NAME=NUMBER", help="See below.")
@click.option("--log-json", metavar="FILE", help="A line of JSON for each request; - for stderr.")
@click.option("--log-prompts", is_flag=True, help="With what was asked.")
@vllm_options
@serving_options
def command(
    path: Path,
    host: str,
    port: int,
    keys: tuple[str, ...],
    api_key_file: Path | None,
    insecure: bool,
    allowed_host: tuple[str, ...],
    cors_origin: tuple[str, ...],
    served_model_name: str | None,
    slots: int,
    limits: tuple[str, ...],
    log_json: str | None,
    log_prompts: bool,
    vllm: VllmChoice,
    serving: dict[str, Any],
) -> None:
    """Serve PATH over OpenAI's protocol: chat, completions, responses, streaming, a page at /."""
    known = _keys(keys, api_key_file)
    local = host in _HERE
    if not local and not (known or insecure):
        raise InputError(f"--host {host} opens the model to others; add --api-key or --insecure.")
    listener = _listen(host, port)  # before the model is loaded: a taken port is told at once
    name = served_model_name or _called(path)
    if vllm.chosen:
        port = listener.getsockname()[1]
        listener.close()
        serve_with_vllm(path, name, known, (host, port), slots, serving, vllm)
        return
    if log_prompts and log_json is None:
        raise InputError("--log-prompts belongs to --log-json.")
    bounds = _limits(limits)
    log = None if log_json is None else _log(log_json, log_prompts)
    from qexport.runtime.server import create_app, run
    from qexport.runtime.serving import Serving, open_generator

    generator = open_generator(path, Serving(slots=slots, **serving), waiting=bounds.queue)
    cache = generator.decoder.reserve()
    hosts: tuple[str, ...] | None = allowed_host or None
    if local and not known:
        hosts = (*_HERE, "[::1]", *allowed_host)
    app = create_app(
        generator, name, limits=bounds, keys=known, hosts=hosts, origins=cors_origin, log=log
    )
    if generator.has_template:
        generator.templates.start()
    shown = f"[{host}]" if ":" in host else host
    about = f"{slots} requests at a time of up to {generator.context} tokens"
    about += f" ({cache / 2**20:.0f} MiB of cache)" if cache else ""
    about += f", by {generator.decoder.kernels}"
    for line in (f"serving {name} at http://{shown}:{listener.getsockname()[1]}/v1", about):
        progress_console().print(line, highlight=False, soft_wrap=True)
    try:
        run(app, listener, bounds)
    finally:
        generator.close()
        if log is not None:
            log.close()


def _called(path: Path) -> str:
    """A folder's name as it was typed, which a symbolic link's is not the one it leads to."""
    return path.resolve().name if path.name in ("", "..") else path.name


def _keys(given: tuple[str, ...], file: Path | None) -> list[str]:
    """Keys of the options and the file. Raises InputError for an empty one."""
    keys = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise InputError(f"{file} is no text of keys, one on each line.") from None
        keys += [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]
        if not keys:
            raise InputError(f"{file} holds no key.")
    if any(not key.strip() or not key.isascii() for key in keys):
        raise InputError("an API key is not empty, and of ASCII characters.")
    return keys


def _log(path: str, with_prompts: bool) -> "RequestLog":
    """Raises InputError where it cannot be written."""
    from qexport.runtime.server.request_log import RequestLog

    try:
        return RequestLog(path, with_prompts)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}).") from error


def _limits(given: tuple[str, ...]) -> "Limits":
    """Limits with those that are given. Raises InputError."""
    from qexport.runtime.server.limits import Limits

    kinds = {f.name: float if isinstance(f.default, float) else int for f in fields(Limits)}
    found: dict[str, Any] = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in kinds:
            raise InputError(f"there is no limit {name!r}; there are {', '.join(kinds)}.")
        try:
            found[name] = kinds[name](number)
        except ValueError as error:
            raise InputError(f"--limit {name} takes a number, not {number!r}.") from error
        if not 0 < found[name] < 1e9:
            raise InputError(f"--limit {name} is more than 0, and less than a billion.")
    return Limits(**found)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio has small pieces sent at once for sockets alone that say themselves that they are TCP;
    # else each waits for the client to acknowledge the one before, which takes 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is taken; choose another --port.") from error
        raise InputError(f"{host}:{port} cannot be listened on ({error.strerror}).") from error
    return listener
