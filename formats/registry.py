"""The table of formats, and opening whatever a folder holds."""

from pathlib import Path

from qexport.checkpoint import Checkpoint, open_source, read_config
from qexport.errors import CheckpointError, InputError
from qexport.formats.base import Format
from qexport.formats.gptq import Gptq, GptqV2
from qexport.formats.native import Native
from qexport.shards import ShardReader

__all__ = ["FORMATS", "format_named", "open_checkpoint"]

FORMATS: dict[str, Format] = {form.name: form for form in (Native(), Gptq(), GptqV2())}


def format_named(name: str) -> Format:
    """The format of that name. Raises InputError with the names there are."""
    if name not in FORMATS:
        raise InputError(f"--format {name} is not one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint of any layout that we read: dense, RUN, ParetoQ, or packed.

    Raises InputError for no folder, CheckpointError for a damaged or unknown one.
    """
    source = open_source(folder)
    if source is not None:
        return source
    config = read_config(folder)
    quantization = config["quantization_config"]
    for form in FORMATS.values():
        if form.detect(quantization):
            return form.read(ShardReader(folder), config)
    raise CheckpointError(
        f"{folder} is quantized as {quantization.get('quant_method')!r}, which this version does "
        f"not read; it reads {', '.join(FORMATS)} and runs of its own."
    )
