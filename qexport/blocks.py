"""A checkpoint's decoder blocks, one in memory at a time, and the activations between them."""

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexport.checkpoint import Checkpoint, module_of
from qexport.errors import QexportError
from qexport.modelling import allocate, meta_model
from qexport.source import as_stored
from qexport.tensor import QuantizedTensor

__all__ = ["Blocks", "Stream", "lost_share", "relative_errors"]

_NEGLIGIBLE = 1e-4  # of the median token's square


class Blocks:
    """The decoder blocks of a checkpoint, dense or dequantized, made one at a time.

    The model's own forward pass runs over a body that holds no block or a single one, so that
    masks, rotary embeddings and whatever else a family does around its blocks are transformers'
    own. Nothing is dropped out.

    stored      dtype that parameters are rounded to, as they will be stored
    quantized   whether a layer, by its name, will be: its weight is read as it is
    """

    def __init__(
        self,
        source: Checkpoint,
        stored: torch.dtype,
        device: torch.device,
        quantized: Callable[[str], object] = lambda _: False,
    ) -> None:
        self._source = source
        self._stored = stored
        self._device = device
        self._quantized = quantized
        self._model = meta_model(source).eval()
        self._body = self._model.model
        self._layers = list(self._body.layers)
        self._types = getattr(self._model.config, "layer_types", None)
        self._norm, self._body.norm = self._body.norm, nn.Identity()
        self._body.rotary_emb = type(self._body.rotary_emb)(config=self._model.config).to(device)
        self._model.config.num_hidden_layers = 1
        self._model.config.use_cache = False

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def width(self) -> int:
        """Of the activations between blocks."""
        return int(self._model.config.hidden_size)

    def name(self, index: int) -> str:
        """Where a block stands in the model, with a dot at the end."""
        return f"model.layers.{index}."

    def make(self, index: int) -> nn.Module:
        """A block with its float32 weights."""
        prefix = self.name(index)
        block: nn.Module = self._layers[index]
        allocate(self._model, block, self._device)
        state = {
            name: self._read(prefix + name).to(self._device) for name, _ in block.named_parameters()
        }
        block.load_state_dict(state, strict=True)
        return block

    def release(self, index: int) -> None:
        """Forget a block's weights."""
        self._layers[index] = self._layers[index].to("meta")
        _trim()

    def embed(self, tokens: Tensor) -> Tensor:
        """What enters the first block, for tokens [n, length]: [n, length, hidden]."""
        table = self._body.embed_tokens
        if table.weight.is_meta:
            self._fill(table, "model.embed_tokens.")
        self._body.layers = nn.ModuleList()
        with torch.no_grad():
            made: Tensor = self._body(tokens.to(self._device), use_cache=False).last_hidden_state
        return made

    def forget_embeddings(self) -> None:
        """They are large."""
        self._body.embed_tokens.to("meta")

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output [n, length, hidden]."""
        out: Tensor = self._through(self._body, index, block, hidden).last_hidden_state
        return out

    def logits(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Of the last block, and of what comes after it [n, length, vocabulary]."""
        head = self._model.lm_head
        if head.weight.is_meta:
            self._fill(self._norm, "model.norm.")
            tied = "lm_head.weight" not in self._source
            self._fill(head, "model.embed_tokens." if tied else "lm_head.")
        self._body.norm = self._norm
        out: Tensor = self._through(self._model, len(self) - 1, block, hidden).logits
        self._body.norm = nn.Identity()
        return out

    def _through(self, model: nn.Module, index: int, block: nn.Module, hidden: Tensor) -> Any:
        """What `model` makes of a block that is given `hidden`.

        Some families scale what enters the first block, and would do so again: the block is given
        `hidden` itself, whatever became of it on the way.
        """
        self._body.layers = nn.ModuleList([block])
        if self._types is not None:
            self._model.config.layer_types = [self._types[index]]

        def given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (hidden, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}

        hook = block.register_forward_pre_hook(given, with_kwargs=True)
        try:
            return model(inputs_embeds=hidden, use_cache=False)
        finally:
            hook.remove()

    def _fill(self, module: nn.Module, prefix: str) -> None:
        allocate(self._model, module, self._device)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self._read(prefix + name))

    def _read(self, name: str) -> Tensor:
        value = self._source[name]
        if isinstance(value, QuantizedTensor):
            return value.dequantize()
        if self._quantized(module_of(name)):
            return value.float()
        return as_stored(name, value, self._stored).float()


def _trim() -> None:
    """Have the C library give back what is free: by itself it keeps a part of every block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class Stream:
    """Activations [n, length, hidden] in a file, read and written some windows at a time.

    They are not mapped into memory: what has been touched of a mapping counts as the process's own.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._path, self._dtype, self._window = path, dtype, shape[1:]
        self._bytes = math.prod(self._window) * dtype.itemsize
        self._size = shape[0] * self._bytes

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return self._window[0]

    def read(self, rows: Tensor | slice, device: torch.device) -> Tensor:
        """Float32 [rows, length, hidden]."""
        return self.stored(rows).to(device).float()

    def stored(self, rows: Tensor | slice) -> Tensor:
        """The same in the file's dtype. Raises QexportError for a file that is not whole."""
        if not self._whole():
            raise QexportError(
                f"{self._path} is gone or cut short; give --no-resume to start over."
            )
        spans = [rows] if isinstance(rows, slice) else [slice(n, n + 1) for n in rows.tolist()]
        count = sum(span.stop - span.start for span in spans)
        found = torch.empty(count, *self._window, dtype=self._dtype)
        raw: memoryview = found.view(torch.uint8).flatten().numpy().data
        with self._path.open("rb") as file:
            for span in spans:
                size = (span.stop - span.start) * self._bytes
                file.seek(span.start * self._bytes)
                file.readinto(raw[:size])
                raw = raw[size:]
        return found

    def write(self, rows: slice, values: Tensor) -> None:
        """Rounded to the file's dtype."""
        stored = values.detach().to(self._dtype).cpu().contiguous()
        if not self._whole():
            with self._path.open("wb") as file:
                file.truncate(self._size)
        with self._path.open("r+b") as file:
            file.seek(rows.start * self._bytes)
            file.write(stored.view(torch.uint8).flatten().numpy().data)

    def remove(self) -> None:
        """What was written is no longer wanted."""
        self._path.unlink(missing_ok=True)

    def _whole(self) -> bool:
        return self._path.is_file() and self._path.stat().st_size == self._size


def relative_errors(made: Tensor, wanted: Tensor) -> Tensor:
    """Of a block's output [n, length, hidden], in squares: [n, length], each token by its own size.

    A few tokens have activations a thousand times as large as the others. A token that has nearly
    none, as one whose embedding is all zeros, does not blow it up.
    """
    norms = wanted.square().sum(-1)
    least = (norms.median() * _NEGLIGIBLE).clamp(min=torch.finfo(torch.float32).tiny)
    return (made.float() - wanted).square().sum(-1) / norms.clamp(min=least)


def lost_share(errors: Tensor) -> float:
    """Their mean, where no token counts as more than lost: what is told, and compared.

    One token that becomes massive where it should not has an error of ten thousand times its size.
    """
    return float(torch.where(errors.isfinite(), errors.clamp(max=1), errors).mean())
