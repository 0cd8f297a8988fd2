"""In what dtype products are computed; weights that are worked on are float32 in any case."""

from pathlib import Path
from typing import Any, Literal

import torch

from qexport.errors import UnsupportedError

__all__ = ["Precision", "autocast", "precision_of"]

Precision = Literal["auto", "bf16", "fp16", "fp32"]


def precision_of(asked: Precision) -> str:
    """`bf16` where the device multiplies it natively, unless told otherwise.

    Raises UnsupportedError for fp16 without a GPU, where nothing scales losses.
    """
    if asked == "fp16" and not torch.cuda.is_available():
        raise UnsupportedError("--precision fp16 wants a GPU; bf16 and fp32 train here too.")
    if asked != "auto":
        return asked
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
