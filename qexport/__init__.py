"""qexport: train, pack, prove and serve low-bit language models.

The names below are imported when they are first used, so that `import qexport` is cheap.
"""

import importlib
from typing import Any

from qexport.version import __version__

_HOMES = {
    "Checkpoint": "qexport.checkpoint",
    "Grid": "qexport.grid",
    "QexportError": "qexport.errors",
    "QuantizedTensor": "qexport.tensor",
    "Scheme": "qexport.grid",
    "open_checkpoint": "qexport.formats",
    "pack": "qexport.formats.pack",
    "verify": "qexport.formats.verify",
}

__all__ = [
    "Checkpoint",
    "Grid",
    "QexportError",
    "QuantizedTensor",
    "Scheme",
    "__version__",
    "open_checkpoint",
    "pack",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qexport' has no attribute {name!r}")
