"""Packed layouts, one file each, and what is done with any of them: open, pack, verify."""

from qexport.formats.base import Format, Verdict
from qexport.formats.registry import FORMATS, format_named, open_checkpoint

__all__ = ["FORMATS", "Format", "Verdict", "format_named", "open_checkpoint"]
