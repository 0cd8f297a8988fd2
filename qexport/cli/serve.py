"""`qexport serve`."""

import errno
import socket
from pathlib import Path
from typing import Any

import click

from qexport.cli.common import Command, progress_console
from qexport.cli.serving import serving_options
from qexport.errors import InputError

_EPILOG = """\b
Examples:
  qexport serve packed
  qexport serve packed --host 0.0.0.0 --api-key "$KEY"
  curl localhost:8000/v1/models"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--api-key", help="Clients must send it as a bearer token.")
@click.option("--insecure", is_flag=True, help="Serve other machines without a key.")
@click.option("--served-model-name", help="Name that requests use; default the folder's.")
@click.option(
    "--slots",
    default=8,
    show_default=True,
    type=click.IntRange(1, 256),
    help="Requests that run at a time; others wait.",
)
@serving_options
def command(
    path: Path,
    host: str,
    port: int,
    api_key: str | None,
    insecure: bool,
    served_model_name: str | None,
    slots: int,
    serving: dict[str, Any],
) -> None:
    """Serve PATH over OpenAI's protocol: models, completions, chat completions, streaming."""
    if host not in ("127.0.0.1", "localhost", "::1") and not (api_key or insecure):
        raise InputError(f"--host {host} opens the model to others; add --api-key or --insecure.")
    listener = _listen(host, port)  # before the model is loaded: a taken port is told at once
    import uvicorn

    from qexport.runtime.server import create_app
    from qexport.runtime.serving import Serving, open_generator

    generator = open_generator(path, Serving(slots=slots, **serving))
    name = served_model_name or path.resolve().name
    app = create_app(generator, name, api_key)
    address = f"http://{host}:{listener.getsockname()[1]}/v1"
    console = progress_console()
    console.print(f"serving {name} at {address}", highlight=False, soft_wrap=True)
    about = f"{slots} requests at a time, by {generator.decoder.kernels}"
    console.print(about, highlight=False, soft_wrap=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10)
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
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
