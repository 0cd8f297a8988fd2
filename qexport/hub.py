"""From what a user names (a folder or a hub id) to a folder on this machine."""

from collections.abc import Sequence
from pathlib import Path

from qexport.errors import InputError

__all__ = ["local_folder"]

_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*")


def local_folder(model: str, wanted: Sequence[str] = _WANTED) -> Path:
    """The folder of `model`, fetched from the hub where it is an id. Only data files are fetched.

    Raises InputError where there is no such folder and no such id, or the hub cannot be reached.
    """
    try:
        path = Path(model).expanduser()
    except RuntimeError:  # there is no such user
        path = Path(model)
    if path.exists():
        if not path.is_dir():
            raise InputError(f"{model} is a file; give the folder that it lies in.")
        return path
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"{model} does not exist; give the folder of a checkpoint or a hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(wanted), etag_timeout=10))
    except Exception as error:  # the library raises whatever its network layer does
        raise InputError(
            f"{model} is not a folder here, and the hub did not give it "
            f"({type(error).__name__}); check the name or the network."
        ) from error
