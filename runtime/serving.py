"""How a checkpoint is served: the decoder that fits the model and the machine."""

import importlib.util
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from qexport.checkpoint import Checkpoint
from qexport.errors import CheckpointError, InputError, UnsupportedError
from qexport.formats import open_checkpoint
from qexport.grid import INT4, Scheme
from qexport.model_sizes import check_sizes
from qexport.runtime.any_model import AnyDecoder
from qexport.runtime.context import cache_context, free_memory, token_bytes
from qexport.runtime.cpu_model import CpuDecoder
from qexport.runtime.cuda_model import CudaDecoder
from qexport.runtime.families import DecoderConfig, decoder_config
from qexport.runtime.generator import Generator
from qexport.runtime.kernels import KERNELS
from qexport.runtime.loader import best_device, open_tokenizer, resolve_dtype
from qexport.runtime.model import Decoder, TorchDecoder
from qexport.settings import check_types

__all__ = ["CACHES", "Serving", "open_decoder", "open_generator"]

CACHES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}


_COMMON = Scheme(INT4, 128)  # which every kernel takes where it runs


@dataclass(frozen=True)
class Serving:
    """How a model is run.

    slots      sequences at a time
    context    tokens of each; None: the model's, as far as all slots go into half of the memory
               that the weights leave
    kernel     a name of `qexport.runtime.kernels.KERNELS`, None: the fastest that does not refuse
    head_bits  8 or 4: rounds the matrix that makes logits to int8 or int4; None keeps it as it is
    cache      dtype of keys and values on the CPU, a name of CACHES
    dtype      of activations on a GPU, in the reference kernel and in transformers' models
    threads    of the CPU decoder; None: torch's number
    """

    slots: int = 1
    context: int | None = None
    kernel: str | None = None
    head_bits: Literal[4, 8] | None = None
    cache: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("slots", "context", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is less than 1.")


def open_generator(path: Path, serving: Serving, waiting: int = 256) -> Generator:
    """The model at `path`, ready to generate; so many requests may wait.

    Raises what reading it and choosing kernels do.
    """
    checkpoint = open_checkpoint(path)
    check_sizes(checkpoint.config)  # transformers reads them for the tokenizer, too
    tokenizer = open_tokenizer(checkpoint)
    try:
        decoder = open_decoder(checkpoint, serving)
    except torch.OutOfMemoryError as error:
        raise UnsupportedError(
            "the GPU's memory does not hold the model and its cache; take fewer slots or a smaller "
            "context."
        ) from error
    return Generator(decoder, tokenizer, _end_tokens(checkpoint), waiting=waiting)


def open_decoder(checkpoint: Checkpoint, serving: Serving) -> Decoder:
    """The decoder for a checkpoint on this machine's best device."""
    if serving.kernel is not None and serving.kernel not in KERNELS:
        raise InputError(f"there is no kernel {serving.kernel!r}; there are {', '.join(KERNELS)}.")
    device = best_device()
    if serving.kernel is not None and not checkpoint.modules:  # no layer of it will ask
        reason = KERNELS[serving.kernel].refuses(_COMMON, (1024, 1024), device)
        if reason is not None:
            raise UnsupportedError(f"--kernel {serving.kernel}: {reason}.")
    config = decoder_config(checkpoint.config)
    dtype = resolve_dtype(checkpoint, serving.dtype)
    if device.type == "cpu" and serving.dtype == "auto":
        dtype = torch.float32
    in_cpp = not isinstance(config, str) and _in_cpp(config, device, serving)
    if not in_cpp:
        _check_elsewhere(serving, config, dtype)
        if serving.threads is not None:
            torch.set_num_threads(serving.threads)
    if isinstance(config, str):
        return AnyDecoder(
            checkpoint,
            slots=serving.slots,
            context=serving.context,
            device=device,
            dtype=dtype,
            kernel=serving.kernel,
        )
    if in_cpp:
        cache = CACHES[serving.cache]
        return CpuDecoder(
            checkpoint,
            config,
            slots=serving.slots,
            context=_context(checkpoint, config, cache, device, serving),
            cache=cache,
            exact=serving.kernel == "cpu-exact",
            head_bits=serving.head_bits,
            threads=serving.threads,
        )
    graphs = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return (CudaDecoder if graphs else TorchDecoder)(
        checkpoint,
        config,
        slots=serving.slots,
        context=_context(checkpoint, config, dtype, device, serving),
        device=device,
        dtype=dtype,
        kernel=serving.kernel,
        head_bits=serving.head_bits,
    )


def _in_cpp(config: DecoderConfig, device: torch.device, serving: Serving) -> bool:
    if device.type != "cpu" or serving.kernel not in (None, "cpu", "cpu-exact"):
        return False
    return serving.kernel is not None or CpuDecoder.refuses(config) is None


def _check_elsewhere(serving: Serving, config: DecoderConfig | str, dtype: torch.dtype) -> None:
    """Raise UnsupportedError for what the C++ decoder alone does, or ours alone."""
    if serving.cache != "float16" and CACHES[serving.cache] != dtype:
        raise UnsupportedError(
            f"--kv-cache is of the CPU decoder; here keys and values are {dtype}, as --dtype says."
        )
    if serving.head_bits is not None and isinstance(config, str):
        raise UnsupportedError(f"--head-bits is of qexport's own decoders, and {config}.")


def _context(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    cache: torch.dtype,
    device: torch.device,
    serving: Serving,
) -> int:
    """Tokens of a sequence, of a cache in the dtype `cache`."""
    weights = sum(entry.stored_bytes for entry in checkpoint.entries.values())
    return cache_context(
        serving.context,
        config.context,
        slots=serving.slots,
        token=token_bytes(config.layers, config.kv_heads, config.head_dim, cache),
        memory=partial(free_memory, device, weights),
    )


def _end_tokens(checkpoint: Checkpoint) -> frozenset[int]:
    """Tokens that end an answer, by config.json and generation_config.json."""
    found = [checkpoint.config.get("eos_token_id")]
    path = checkpoint.folder / "generation_config.json"
    if path.is_file():
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged; fetch the checkpoint again.") from error
    tokens = [t for value in found for t in (value if isinstance(value, list) else [value])]
    return frozenset(token for token in tokens if type(token) is int)
