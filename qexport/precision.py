"""In what dtype products are computed; weights that are worked on are float32 in any case."""

from pathlib import Path
from typing import Any, Literal

import torch

from qexport.errors import UnsupportedError

__all__ = ["Precision", "autocast", "dtype_of", "precision_of", "product_dtype"]

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


def dtype_of(precision: str) -> torch.dtype:
    """What products are computed in at a `precision_of`."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def autocast(precision: str, device: torch.device) -> Any:
    """The context of forward passes."""
    dtype = dtype_of(precision)
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled)


def product_dtype(device: torch.device) -> torch.dtype:
    """What a linear layer multiplies in, where this is called: autocast's dtype or float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32
