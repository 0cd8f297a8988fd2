"""`Format`: what every packed layout answers, and `Verdict`, how it holds a quantized matrix."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint, Entry
from qexport.errors import InputError
from qexport.grid import Grid, Scheme
from qexport.stream import FilePlan
from qexport.tensor import QuantizedTensor

__all__ = [
    "EMBEDDINGS",
    "EMBEDDING_FORMS",
    "Encode",
    "Format",
    "Layout",
    "Options",
    "Plan",
    "ReadBack",
    "Verdict",
    "holds_scales",
]


EMBEDDING_FORMS = ("exact", "f16", "q8_0", "q6_k")  # the words that `Options.embeddings` may be
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Options:
    """What the user asks of a format.

    bits         the width of codes in the file; None is the narrowest that is exact
    block        GGUF only: the block type; None is the narrowest that is exact
    embeddings   GGUF only: how dense matrices are stored: `exact`, `f16`, `q8_0` or `q6_k`
    allow_lossy  scales, minima and embeddings may be rounded to what the layout stores
    """

    bits: int | None = None
    block: str | None = None
    embeddings: str = "exact"
    allow_lossy: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a format does with one (scheme, shape).

    holder           the scheme of the codes in the file, or None where the format refuses
    stored           what the layout calls it: a grid's name, or a GGUF block type
    reason           why it refuses, else None
    bits_per_weight  on disk, scales and zero points included
    bound            the largest error, in float16 units in the last place of the largest value
                     that a group can take; 0 is exact
    """

    holder: Scheme | None
    stored: str = ""
    reason: str | None = None
    bits_per_weight: float = 0.0
    bound: float = 0.0

    @property
    def exact(self) -> bool:
        return self.holder is not None and self.bound == 0

    def kind(self, scheme: Scheme) -> str:
        """`exact`, `embedded` (exact, on a wider grid), `bounded` or `refused`."""
        if self.holder is None:
            return "refused"
        if self.bound:
            return "bounded"
        return "exact" if self.holder.grid == scheme.grid else "embedded"

    def describe(self, scheme: Scheme) -> str:
        """One phrase for a report: how `scheme` is held."""
        if self.holder is None:
            return f"{scheme.grid.name} refused: {self.reason}"
        how = scheme.grid.name
        if self.holder.grid != scheme.grid:
            half = " at half the step" if scheme.grid.factor_into(self.holder.grid) == 2 else ""
            how = f"{how} as {self.holder.grid.name} codes{half}"
        if self.stored != self.holder.grid.name:
            how = f"{how} in {self.stored}"
        kind = "exact" if self.exact else f"rounded by at most {self.bound:g} ulp"
        return f"{how}, {kind}"


def holds_scales(mine: torch.dtype, theirs: torch.dtype) -> bool:
    """Whether scales of a dtype are stored in another as they are.

    So are bfloat16's in float16, which has more bits and less range: `pack` refuses a scale that is
    beyond its normal numbers.
    """
    return mine in (theirs, torch.float32) or (mine, theirs) == (torch.float16, torch.bfloat16)


Plan = Mapping[str, Verdict]  # by module; none of them a refusal


# (name in the source, tensor on its holder's grid, its verdict if quantized) -> bytes by the name
# of the file's tensors
Encode = Callable[[str, Tensor | QuantizedTensor, Verdict | None], dict[str, Tensor]]
# (name in the source, its entry there, its verdict if quantized) -> what the file holds
ReadBack = Callable[[str, Entry, Verdict | None], Tensor | QuantizedTensor]


@dataclass(frozen=True)
class Layout:
    """The files of an artefact before any weight is in them, and what fills them.

    files   those with tensors, every offset fixed
    json    side files
    extra   tensors of the format's own, which stand for none of the source
    encode  from a tensor of the source to the file's
    reopen  reads single tensors of a folder that is still being written
    """

    files: list[FilePlan]
    json: dict[str, Any]
    extra: dict[str, Tensor]
    encode: Encode
    reopen: Callable[[Path], ReadBack]


class Format(ABC):
    """One on-disk layout. `name` is the word after `--format`."""

    name: ClassVar[str]
    grids: ClassVar[tuple[Grid, ...]]  # what the layout stores, narrowest first
    blocks: ClassVar[tuple[str, ...]] = ()  # the words that `Options.block` may be

    @abstractmethod
    def detect(self, path: Path) -> bool:
        """Whether `path` holds this layout; damaged or foreign files are simply not of it."""

    @abstractmethod
    def read(self, path: Path) -> Checkpoint:
        """Open what `detect` has recognised. Raises CheckpointError where it is damaged."""

    @abstractmethod
    def verdict(self, scheme: Scheme, shape: tuple[int, int], options: Options) -> Verdict:
        """How a matrix [out, in] quantized by `scheme` is held, or the reason why it is not."""

    @abstractmethod
    def layout(self, source: Checkpoint, plan: Plan, options: Options) -> Layout:
        """Where everything will stand. Raises RefusedError for what the layout cannot say."""

    def check_options(self, options: Options) -> None:
        """Raise InputError for an option that this format does not have."""
        if options.block is not None and options.block not in self.blocks:
            names = f"it has {', '.join(self.blocks)}" if self.blocks else "only gguf has them"
            raise InputError(f"--type {options.block} is no block type of {self.name}; {names}.")
        if options.embeddings not in EMBEDDING_FORMS:
            known = ", ".join(EMBEDDING_FORMS)
            raise InputError(f"--embeddings {options.embeddings}: there are {known}.")
        if options.embeddings != "exact" and not self.blocks:
            raise InputError("--embeddings is for gguf; other formats keep dense tensors as is.")

    def differences(self, source: Checkpoint, artefact: Checkpoint) -> list[str]:
        """Names of what the file says beside its tensors and is unlike the source."""
        return []
