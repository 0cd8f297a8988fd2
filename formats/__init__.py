"""Packed layouts: one file each, and what is done with all of them."""

from qexport.formats.base import Format, Options, Verdict
from qexport.formats.registry import FORMATS, detect, format_named, open_checkpoint

__all__ = [
    "FORMATS",
    "Format",
    "Options",
    "Verdict",
    "detect",
    "format_named",
    "open_checkpoint",
]
