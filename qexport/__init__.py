"""qexport: train, quantize, pack, prove and serve low-bit language models.

The names below are imported when they are first used, so that `import qexport` is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qexport.version import __version__

if TYPE_CHECKING:
    from qexport.api import generate, load, open_checkpoint, pack, quantize, train, verify
    from qexport.checkpoint import Checkpoint
    from qexport.errors import QexportError
    from qexport.formats.pack import PackReport
    from qexport.formats.verify import Verification
    from qexport.grid import Grid, Scheme
    from qexport.quantization import GptqOptions, QuantizeConfig, SignRoundOptions
    from qexport.runtime.generator import Generator, Sampling
    from qexport.runtime.serving import Serving
    from qexport.tensor import QuantizedTensor
    from qexport.training import TrainConfig

_HOMES = {
    "Checkpoint": "qexport.checkpoint",
    "Generator": "qexport.runtime.generator",
    "GptqOptions": "qexport.quantization",
    "Grid": "qexport.grid",
    "PackReport": "qexport.formats.pack",
    "QexportError": "qexport.errors",
    "QuantizeConfig": "qexport.quantization",
    "QuantizedTensor": "qexport.tensor",
    "Sampling": "qexport.runtime.generator",
    "Scheme": "qexport.grid",
    "Serving": "qexport.runtime.serving",
    "SignRoundOptions": "qexport.quantization",
    "TrainConfig": "qexport.training",
    "Verification": "qexport.formats.verify",
    "generate": "qexport.api",
    "load": "qexport.api",
    "open_checkpoint": "qexport.api",
    "pack": "qexport.api",
    "quantize": "qexport.api",
    "train": "qexport.api",
    "verify": "qexport.api",
}

__all__ = [
    "Checkpoint",
    "Generator",
    "GptqOptions",
    "Grid",
    "PackReport",
    "QexportError",
    "QuantizeConfig",
    "QuantizedTensor",
    "Sampling",
    "Scheme",
    "Serving",
    "SignRoundOptions",
    "TrainConfig",
    "Verification",
    "__version__",
    "generate",
    "load",
    "open_checkpoint",
    "pack",
    "quantize",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qexport' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
