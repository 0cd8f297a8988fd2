"""The table of formats, and opening whatever a path holds."""

from pathlib import Path

from qexport.checkpoint import Checkpoint, quantization_of, read_config
from qexport.errors import CheckpointError, InputError
from qexport.formats.awq import Awq
from qexport.formats.base import Format
from qexport.formats.bitsandbytes import BitsAndBytes
from qexport.formats.compressed_tensors import CompressedTensors, IntQuantized
from qexport.formats.gguf import Gguf
from qexport.formats.gptq import Gptq, GptqV2
from qexport.formats.humming import Humming
from qexport.formats.native import Native
from qexport.source import open_source

__all__ = ["FORMATS", "detect", "format_named", "open_checkpoint"]

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Native(),
        Gptq(),
        GptqV2(),
        Awq(),
        CompressedTensors(),
        IntQuantized(),
        Humming(),
        BitsAndBytes(),
        Gguf(),
    )
}


def format_named(name: str) -> Format:
    """The format of that name. Raises InputError with the names there are."""
    if name not in FORMATS:
        raise InputError(f"--format {name} is not one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def detect(path: Path) -> Format | None:
    """The packed format that `path` holds by its files, or None."""
    return next((form for form in FORMATS.values() if form.detect(path)), None)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any layout that we read: dense, RUN, ParetoQ, or packed.

    Raises InputError for no folder, CheckpointError for a damaged or unknown one.
    """
    form = detect(path)
    if form is not None:
        return form.read(path)
    source = open_source(path)
    if source is not None:
        return source
    quantization = quantization_of(path) or read_config(path)["quantization_config"]
    raise CheckpointError(
        f"{path} is quantized as {quantization.get('quant_method')!r}, which this version does "
        f"not read; it reads {', '.join(FORMATS)} and runs of its own."
    )
