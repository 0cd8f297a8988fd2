"""GGUF: container, block types, names, hyper-parameters and vocabulary, a file each."""

from qexport.formats.gguf.format import Gguf

__all__ = ["Gguf"]
