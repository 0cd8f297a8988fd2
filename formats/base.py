"""`Format`: what every packed layout answers, and what they share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint, Modules
from qexport.grid import Grid, Scheme, dtype_name
from qexport.shards import ShardReader
from qexport.tensor import QuantizedTensor

__all__ = ["Format", "Verdict"]


@dataclass(frozen=True)
class Verdict:
    """What a format does with one (scheme, shape).

    holder           the scheme that the file holds, or None where the format refuses
    reason           why it refuses, else None
    bits_per_weight  on disk, scales and zero points included
    exact            False only where scales are rounded, which needs --allow-lossy
    """

    holder: Scheme | None
    reason: str | None = None
    bits_per_weight: float = 0.0
    exact: bool = True

    def describe(self, scheme: Scheme) -> str:
        """One phrase for a report: how `scheme` is held."""
        if self.holder is None:
            return f"{scheme.grid.name} refused: {self.reason}"
        how = scheme.grid.name
        if self.holder.grid != scheme.grid:
            factor, _ = scheme.grid.embedding(self.holder.grid) or (1, 0)
            step = " at half the step" if factor == 2 else ""
            how = f"{how} as {self.holder.grid.name} codes{step}"
        kind = "exact" if self.exact else "scales rounded"
        return f"{how}, {kind}, {self.bits_per_weight:.4g} bits per weight"


class Format(ABC):
    """One on-disk layout. `name` is the word after `--format`."""

    name: ClassVar[str]
    grids: ClassVar[tuple[Grid, ...]]  # what the layout stores, narrowest first
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]]  # the first is what others are rounded to

    @abstractmethod
    def detect(self, quantization: dict[str, Any]) -> bool:
        """Whether a config.json's quantization_config is of this layout."""

    @abstractmethod
    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] quantized by `scheme` cannot be stored as it is, or None."""

    @abstractmethod
    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The file's tensors for one module; `refuses` has said None to its scheme."""

    @abstractmethod
    def quantization_config(self, modules: Modules) -> dict[str, Any]:
        """What config.json says of the modules. Raises RefusedError if it cannot say it."""

    @abstractmethod
    def read(self, reader: ShardReader, config: dict[str, Any]) -> Checkpoint:
        """Open a folder that `detect` has recognised; `config` is its whole config.json."""

    def extra_files(self, quantization: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """JSON files that the layout wants beside config.json."""
        return {}

    def bits_per_weight(self, scheme: Scheme, in_features: int) -> float:
        """Bits on disk per weight, scales and zero points included."""
        return scheme.bits_per_weight(in_features)

    def verdict(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        *,
        bits: int | None = None,
        allow_lossy: bool = False,
    ) -> Verdict:
        """The narrowest holder of `scheme` for a matrix [out, in], or the reason for none.

        `bits` asks for that width; `allow_lossy` lets scales be rounded to the layout's dtype.
        """
        exact = scheme.scale_dtype in self.scale_dtypes
        if not exact and not allow_lossy:
            mine = dtype_name(self.scale_dtypes[0])
            return Verdict(
                None,
                f"{self.name} stores {mine} scales, and these are {dtype_name(scheme.scale_dtype)}"
                f" values that {mine} does not hold (--allow-lossy rounds them)",
            )
        scale_dtype = scheme.scale_dtype if exact else self.scale_dtypes[0]
        reason = self._no_grid(scheme, bits)
        for grid in self.grids:
            if (bits is None or grid.bits == bits) and scheme.grid.embedding(grid):
                holder = Scheme(grid, scheme.group_size, scale_dtype)
                refusal = self.refuses(holder, shape)
                if refusal is None:
                    size = self.bits_per_weight(holder, shape[1])
                    return Verdict(holder, None, size, exact)
                reason = refusal
        return Verdict(None, reason)

    def _no_grid(self, scheme: Scheme, bits: int | None) -> str:
        width = "" if bits is None else f" at {bits} bits"
        zero = scheme.grid.zero
        half = zero is not None and zero % 1 != 0
        why = f", whose zero point {zero} is not an integer" if half else ""
        holders = sorted({g.bits for g in self.grids if scheme.grid.embedding(g)})
        instead = f"; {' or '.join(map(str, holders))} bits would" if holders else ""
        return f"{self.name}{width} has no grid that holds {scheme.grid.name}{why}{instead}"
