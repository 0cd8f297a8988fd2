"""What vLLM finds where qexport is installed beside it (entry point `vllm.general_plugins`).

The only package here that imports vLLM. What it uses of it is the same from 0.29 to 0.33.
"""

import logging

import vllm
from vllm.model_executor.layers.quantization import register_quantization_config

from qexport.runtime.vllm_plugin.native import NativeConfig

__all__ = ["register"]

_log = logging.getLogger("vllm.qexport")
_KNOWN = (0, 29), (0, 33)


def register() -> None:
    """Teach this process's vLLM what we have; each of its processes calls it, maybe twice."""
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
    if not _KNOWN[0] <= version <= _KNOWN[1]:
        _log.warning("qexport was written for vLLM 0.29 to 0.33, not %s.", vllm.__version__)
    register_quantization_config("qexport")(NativeConfig)
    try:
        from qexport.runtime.vllm_plugin.wna16 import register_kernel
    except ImportError as error:
        _log.warning(
            "vLLM %s has no place for others' kernels (%s): compressed-tensors of 2 and 3 bits "
            "are not served on CPUs.",
            *(vllm.__version__, error),
        )
    else:
        register_kernel()
