"""Where things are kept that can be made again: `$QEXPORT_CACHE`, or `~/.cache/qexport`."""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(kind: str) -> Path:
    """The folder of one kind of things; it need not be there yet."""
    home = os.environ.get("QEXPORT_CACHE") or Path.home() / ".cache" / "qexport"
    return Path(home) / kind
