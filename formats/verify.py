"""Proof that an artefact is its source: every code, every dequantized bit, every dense tensor."""

import contextlib
import math
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint, carried_files
from qexport.formats.registry import FORMATS
from qexport.tensor import QuantizedTensor

__all__ = ["Verification", "compare", "compare_rest", "verify"]

_CHUNK = 1 << 22  # weights that are dequantized at a time
_NAMED = 5  # how many offenders a report names


@dataclass
class Verification:
    """What `verify` counted.

    modules, weights   quantized matrices compared, and the weights in them
    decoded            those of them that the artefact holds dense: their values were compared
    differing_codes    codes unlike the source's, re-coded for the artefact's grid
    differing_bits     bits unlike in the float32 values that both dequantize to
    largest_error      largest |difference| of two such values
    largest_ulp        the same in float16 units in the last place of what its group can reach
    largest_dense_error  largest |difference| in another tensor of the same shape
    dense              other tensors compared; differing_dense those that are unlike
    missing, extra     names that only one side has; differing_files likewise for side files
    """

    modules: int = 0
    weights: int = 0
    decoded: int = 0
    differing_codes: int = 0
    differing_bits: int = 0
    largest_error: float = 0.0
    largest_ulp: float = 0.0
    largest_dense_error: float = 0.0
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
        return self.others_equal and not self.differing_dense

    @property
    def others_equal(self) -> bool:
        """Whether names and side files are equal."""
        return not (self.missing or self.extra or self.differing_files)

    def add(self, other: "Verification") -> None:
        """Take in what was counted for other tensors."""
        for key, value in asdict(other).items():
            mine = getattr(self, key)
            largest = key.startswith("largest_")
            setattr(self, key, max(mine, value) if largest else mine + value)

    def to_json(self) -> dict[str, Any]:
        return {"exact": self.exact, **asdict(self)}

    def describe(self) -> str:
        """One sentence for people."""
        codes = f"{self.differing_codes} differing codes, "
        counts = (
            f"{codes if self.decoded < self.modules else ''}{self.differing_bits} differing bits"
        )
        dense = f", {self.decoded} of them dense there" if self.decoded else ""
        matrices = f"{self.modules} matrices ({self.weights:,} weights{dense})"
        over = f"{matrices} and {self.dense} other tensors"
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
        error = (
            f", largest error {self.largest_error:.3g} ({self.largest_ulp:.2g} ulp)"
            if self.differing_bits
            else ""
        )
        where = matrices if self.differing_dense else over
        return f"NOT exact: {counts}{error} in {where}; " + "; ".join(parts)


def verify(source: Checkpoint, artefact: Checkpoint) -> Verification:
    """Compare `artefact`, as its own reader sees it, with what `source` trained."""
    report = Verification()
    for name in source:
        if name in artefact:
            report.add(compare(name, source[name], artefact[name]))
    report.add(compare_rest(source, artefact))
    return report


def compare_rest(source: Checkpoint, artefact: Checkpoint) -> Verification:
    """Compare everything but the tensors' contents: names, config, side files."""
    report = Verification()
    report.missing = sorted(set(source) - set(artefact))
    report.extra = sorted(set(artefact) - set(source))
    if artefact.layout in FORMATS:
        report.differing_files += FORMATS[artefact.layout].differences(source, artefact)
    lone = artefact.folder.is_file()  # a GGUF file has it all inside, and was asked above
    if source.config != artefact.config and not lone:
        report.differing_files.append("config.json")
    if not lone:
        report.differing_files += _differing_files(source, artefact)
    return report


def _differing_files(source: Checkpoint, artefact: Checkpoint) -> list[str]:
    """Of those that go with the weights; from a GGUF file they are made as `pack` makes them."""
    with contextlib.ExitStack() as stack:
        mine = source.folder
        if source.make_tokenizer is not None:
            if artefact.make_tokenizer is not None:  # files themselves, told apart by metadata
                return []
            mine = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            source.copy_files(mine)
        names = {file.name for side in (mine, artefact.folder) for file in carried_files(side)}
        return [n for n in sorted(names) if not _same_file(mine / n, artefact.folder / n)]


def compare(
    name: str, mine: Tensor | QuantizedTensor, theirs: Tensor | QuantizedTensor
) -> Verification:
    """Compare one tensor of the source with what an artefact holds for it.

    Dense tensors are equal if their values are: GGUF keeps norms in float32, whatever the source.
    """
    report = Verification()
    if tuple(mine.shape) != tuple(theirs.shape):  # there are no codes or bits to count
        return Verification(dense=1, differing_dense=[name])
    if isinstance(mine, QuantizedTensor) and isinstance(theirs, QuantizedTensor):
        report.modules = 1
        report.weights = mine.codes.numel()
        _compare_quantized(name, mine, theirs, report)
        return report
    if isinstance(mine, QuantizedTensor) and isinstance(theirs, Tensor):
        report.modules = report.decoded = 1
        report.weights = mine.codes.numel()
        _compare_values(mine, theirs.float(), report)
        report.offenders += [name] if report.differing_bits else []
        return report
    report.dense = 1
    if (
        isinstance(mine, QuantizedTensor)
        or isinstance(theirs, QuantizedTensor)
        or mine.is_floating_point() != theirs.is_floating_point()
        or _differing_bits(*_same_dtype(mine, theirs))
    ):
        report.differing_dense.append(name)
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            error = (mine.float() - theirs.float()).abs().nan_to_num(math.inf, math.inf)
            report.largest_dense_error = float(error.max())
    return report


def _same_dtype(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    wider = torch.promote_types(mine.dtype, theirs.dtype)
    return mine.to(wider), theirs.to(wider)


def _compare_quantized(
    name: str, mine: QuantizedTensor, theirs: QuantizedTensor, report: Verification
) -> None:
    recoded = _recoded(mine, theirs)
    if recoded is None:
        report.differing_codes = mine.codes.numel()
    elif not _equal_bytes(recoded.codes, theirs.codes):
        report.differing_codes = int((recoded.codes != theirs.codes).sum())
    elif mine.scheme == theirs.scheme and _same(recoded, theirs):
        return
    step = max(1, _CHUNK // mine.shape[1])
    for first in range(0, mine.shape[0], step):
        part = slice(first, first + step)
        _compare_values(mine.rows(part), theirs.rows(part).dequantize(), report)
    if report.differing_codes or report.differing_bits:
        report.offenders.append(name)


def _recoded(mine: QuantizedTensor, theirs: QuantizedTensor) -> QuantizedTensor | None:
    """The source's tensor with its codes on the artefact's grid, or None where they do not fit."""
    try:
        return mine.embed(theirs.scheme.grid)
    except ValueError:
        return None


def _same(mine: QuantizedTensor, theirs: QuantizedTensor) -> bool:
    """Whether two tensors of one scheme and the same codes are the same to the bit."""
    if _differing_bits(mine.scales, theirs.scales):
        return False
    offsets = (mine.zeros, theirs.zeros), (mine.minima, theirs.minima)
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in offsets
    )


def _compare_values(mine: QuantizedTensor, found: Tensor, report: Verification) -> None:
    expected = mine.dequantize()
    differing = _differing_bits(expected, found)
    if not differing:
        return
    report.differing_bits += differing
    error = (expected - found).abs()
    error = error.nan_to_num(math.inf, math.inf)  # NaN would pass every comparison
    report.largest_error = max(report.largest_error, float(error.max()))
    in_ulp = error.view(*mine.scales.shape, -1).amax(-1) / _group_ulp(mine)
    report.largest_ulp = max(report.largest_ulp, float(in_ulp.max()))


def _group_ulp(tensor: QuantizedTensor) -> Tensor:
    """A float16 unit in the last place of the largest value that each group can take."""
    grid = tensor.scheme.grid
    top = grid.levels - 1
    if grid.values is not None:
        reach = torch.tensor(max(map(abs, grid.values)))
    elif tensor.zeros is None:
        reach = torch.tensor(max(grid.middle, top - grid.middle))
    else:
        reach = torch.maximum(tensor.zeros.float(), top - tensor.zeros.float())
    largest = (tensor.scales.float().abs() * reach).clamp_min(2.0**-14)
    return torch.exp2(largest.log2().floor() - 10)


def _differing_bits(mine: Tensor, theirs: Tensor) -> int:
    if _equal_bytes(mine, theirs):
        return 0
    a, b = (t.contiguous().flatten().view(torch.uint8) for t in (mine, theirs))
    return int(np.unpackbits((a ^ b).numpy()).sum())


def _equal_bytes(mine: Tensor, theirs: Tensor) -> bool:
    a, b = (t.contiguous().flatten().view(torch.uint8) for t in (mine, theirs))
    if a.numel() % 8 == 0:  # torch compares one element at a time, so wide ones are faster
        a, b = a.view(torch.int64), b.view(torch.int64)
    return torch.equal(a, b)


def _same_file(mine: Path, theirs: Path) -> bool:
    try:
        return mine.read_bytes() == theirs.read_bytes()
    except OSError:
        return False
