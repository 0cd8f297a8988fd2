"""Proof that an artefact is its source: every code, every dequantized bit, every dense tensor."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint
from qexport.tensor import QuantizedTensor

__all__ = ["Verification", "verify"]

_NAMED = 5  # how many offenders a report names


@dataclass
class Verification:
    """What `verify` counted.

    modules, weights   quantized matrices compared, and the weights in them
    differing_codes    codes unlike the source's, re-coded for the artefact's grid
    differing_bits     bits unlike in the float32 values that both dequantize to
    largest_error      largest |difference| of two such values
    dense              other tensors compared; differing_dense those that are unlike
    missing, extra     names that only one side has; differing_files likewise for side files
    """

    modules: int = 0
    weights: int = 0
    differing_codes: int = 0
    differing_bits: int = 0
    largest_error: float = 0.0
    dense: int = 0
    differing_dense: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    differing_files: list[str] = field(default_factory=list)
    offenders: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return self.values_exact and self.rest_equal

    @property
    def values_exact(self) -> bool:
        return not (self.differing_codes or self.differing_bits)

    @property
    def rest_equal(self) -> bool:
        """Whether all but the quantized values is equal."""
        return not (self.differing_dense or self.missing or self.extra or self.differing_files)

    def to_json(self) -> dict[str, Any]:
        return {"exact": self.exact, **asdict(self)}

    def describe(self) -> str:
        """One sentence for people."""
        counts = f"{self.differing_codes} differing codes, {self.differing_bits} differing bits"
        over = f"{self.modules} matrices ({self.weights:,} weights) and {self.dense} other tensors"
        if self.exact:
            return f"exact: {counts} in {over}"
        lists = {
            "dense tensors differ": self.differing_dense,
            "missing": self.missing,
            "not in the source": self.extra,
            "files differ": self.differing_files,
            "in": self.offenders,
        }
        parts = [
            f"{what}: {', '.join(names[:_NAMED])}{' …' if len(names) > _NAMED else ''}"
            for what, names in lists.items()
            if names
        ]
        error = f", largest error {self.largest_error:.3g}" if self.differing_bits else ""
        return f"NOT exact: {counts}{error} in {over}; " + "; ".join(parts)


def verify(source: Checkpoint, artefact: Checkpoint) -> Verification:
    """Compare `artefact`, as its own reader sees it, with what `source` trained."""
    report = Verification()
    report.missing = sorted(set(source) - set(artefact))
    report.extra = sorted(set(artefact) - set(source))
    for name in source:
        if name in artefact:
            _compare(name, source[name], artefact[name], report)
    if source.config != artefact.config:
        report.differing_files.append("config.json")
    names = {file.name for side in (source, artefact) for file in side.carried_files()}
    for name in sorted(names):
        if not _same_file(source.folder / name, artefact.folder / name):
            report.differing_files.append(name)
    return report


def _compare(
    name: str,
    mine: Tensor | QuantizedTensor,
    theirs: Tensor | QuantizedTensor,
    report: Verification,
) -> None:
    if isinstance(mine, QuantizedTensor) and isinstance(theirs, QuantizedTensor):
        report.modules += 1
        report.weights += mine.codes.numel()
        _compare_quantized(name, mine, theirs, report)
        return
    report.dense += 1
    if (
        isinstance(mine, QuantizedTensor)
        or isinstance(theirs, QuantizedTensor)
        or mine.dtype != theirs.dtype
        or mine.shape != theirs.shape
        or _differing_bits(mine, theirs)
    ):
        report.differing_dense.append(name)


def _compare_quantized(
    name: str, mine: QuantizedTensor, theirs: QuantizedTensor, report: Verification
) -> None:
    if mine.shape != theirs.shape:
        report.differing_dense.append(name)
        return
    recoding = mine.scheme.grid.embedding(theirs.scheme.grid)
    if recoding is None:
        codes = mine.codes.numel()
    else:
        factor, offset = recoding
        codes = int((mine.codes * factor + offset != theirs.codes).sum())
    expected, found = mine.dequantize(), theirs.dequantize()
    differing = _differing_bits(expected, found)
    if differing:
        error = float((expected - found).abs().max())
        report.largest_error = max(report.largest_error, error)
    report.differing_codes += codes
    report.differing_bits += differing
    if codes or differing:
        report.offenders.append(name)


def _differing_bits(mine: Tensor, theirs: Tensor) -> int:
    a, b = (t.contiguous().flatten().view(torch.uint8).numpy() for t in (mine, theirs))
    if np.array_equal(a, b):
        return 0
    return int(np.unpackbits(a ^ b).sum())


def _same_file(mine: Path, theirs: Path) -> bool:
    try:
        return mine.read_bytes() == theirs.read_bytes()
    except OSError:
        return False
