"""What the commands do, as calls: the names that `import qexport` gives.

Every one raises `QexportError` with a sentence that says what is wrong; the messages name options
of the command line, which fields and arguments are called after.
"""

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexport.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qexport.checkpoint import Checkpoint
    from qexport.formats.pack import PackReport
    from qexport.formats.verify import Verification
    from qexport.quantization import QuantizeConfig
    from qexport.runtime.generator import Generator
    from qexport.runtime.serving import Serving
    from qexport.training import TrainConfig

__all__ = ["generate", "load", "open_checkpoint", "pack", "quantize", "train", "verify"]

Folder = str | PathLike[str]


def train(config: "TrainConfig", *, progress: bool = False) -> dict[str, Any]:
    """Train a model on a low-bit grid into the RUN `config.output`; `qexport train`.

    config     a folder or a hub id as `model`, the rest as the command's options
    progress   print what the command prints on stderr

    Returns what stands in the run's all_results.json: steps, losses, perplexities. A run that was
    killed goes on.
    """
    from qexport.hub import local_folder
    from qexport.training import train as run

    local = replace(config, model=local_folder(str(config.model)))
    return run(local, _console(progress))


def quantize(config: "QuantizeConfig", *, progress: bool = False) -> dict[str, Any]:
    """Quantize a model without training it into the RUN `config.output`; `qexport quantize`.

    Arguments are those of `train`. Returns what stands in the run's all_results.json: every
    layer's relative error, and bits per weight.
    """
    from qexport.hub import local_folder
    from qexport.quantization import quantize_model

    local = replace(config, model=local_folder(str(config.model)))
    return quantize_model(local, _console(progress))


def pack(
    run: Folder,
    output: Folder,
    format: str = "native",
    *,
    bits: int | None = None,
    type: str | None = None,
    embeddings: str = "exact",
    allow_lossy: bool = False,
) -> "PackReport":
    """Write a RUN, or any checkpoint that we read, in a format, and prove it; `qexport pack`.

    bits          width in the file; None: the narrowest that is exact
    type          GGUF's block type; None: the narrowest that is exact
    embeddings    GGUF's, `exact`, `f16`, `q8_0` or `q6_k`; the last two are not exact
    allow_lossy   let the format round what it cannot hold, and say by how much

    Raises RefusedError where the format cannot hold the weights, and names those that can.
    """
    from qexport.formats import Options, format_named
    from qexport.formats.pack import pack as write
    from qexport.settings import check_types

    options = Options(bits, type and type.upper(), embeddings, allow_lossy)
    check_types(options)
    return write(open_checkpoint(run), format_named(format), Path(output), options)


def verify(run: Folder, artefact: Folder) -> "Verification":
    """Compare every code, every dequantized bit and every other tensor; `qexport verify`.

    `exact` of the result says whether all are equal. Nothing is raised where they are not.
    """
    from qexport.formats.verify import verify as compare

    return compare(open_checkpoint(run), open_checkpoint(artefact))


def open_checkpoint(path: Folder) -> "Checkpoint":
    """A checkpoint of any layout that we read: tensors by name, read when they are asked for."""
    from qexport.formats import open_checkpoint as open_any

    return open_any(Path(path))


def load(path: Folder, serving: "Serving | None" = None) -> "Generator":
    """The model at `path`, of any layout that we read, ready to `generate`.

    It is a context manager; leaving it ends the model's thread. Any number of threads may ask it.
    """
    from qexport.runtime.serving import Serving, open_generator

    return open_generator(Path(path), serving or Serving())


def generate(
    model: "Generator | Folder",
    prompt: str | list[dict[str, Any]],
    *,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> str:
    """Continue a text, or answer a conversation of `{"role": …, "content": …}`.

    model        what `load` gave, or a folder that is loaded for this one call
    max_tokens   None: 128, or what the context has left
    temperature  0 is greedy

    Returns the new text alone.
    """
    from qexport.runtime.generator import Generator, Sampling

    if not isinstance(model, Generator):
        with load(model) as loaded:
            return generate(
                loaded,
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
    if not isinstance(prompt, (str, list)):
        raise TypeError(f"a prompt is a text or a list of messages, and no {type(prompt).__name__}")
    if prompt == []:
        raise InputError("the conversation is empty; give a message.")
    tokens = model.encode(prompt) if isinstance(prompt, str) else model.encode_chat(prompt)
    count = model.room(tokens) if max_tokens is None else max_tokens
    sampling = Sampling(count, temperature, top_p, seed)
    return "".join(piece.text for piece in model.stream(tokens, sampling))


def _console(progress: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, markup=False, quiet=not progress)
