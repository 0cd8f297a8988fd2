"""In what the products of training are computed; masters are float32 in any case."""

from pathlib import Path
from typing import Any

import torch

from qexport.errors import UnsupportedError
from qexport.train.config import TrainConfig

__all__ = ["autocast", "precision_of"]


def precision_of(config: TrainConfig) -> str:
    """`bf16` where the device multiplies it natively, unless told otherwise.

    Raises UnsupportedError for fp16 without a GPU, where nothing scales losses.
    """
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise UnsupportedError("--precision fp16 wants a GPU; bf16 and fp32 train here too.")
    if config.precision != "auto":
        return config.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def autocast(precision: str, device: torch.device) -> Any:
    """The context of forward passes."""
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, half, enabled=precision != "fp32")
