"""From a checkpoint to a packed folder: choose holders, stream, verify, then let it be seen."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qexport.checkpoint import Checkpoint, Modules, module_of
from qexport.errors import InputError, RefusedError, VerificationError
from qexport.formats.base import Format, Verdict
from qexport.formats.registry import FORMATS, open_checkpoint
from qexport.formats.verify import Verification, verify
from qexport.grid import Scheme
from qexport.output import atomic_folder, check_writable, mark, write_json
from qexport.shards import ShardWriter
from qexport.tensor import QuantizedTensor

__all__ = ["PackReport", "holdings", "pack", "plan"]

Plan = dict[str, Verdict]


@dataclass(frozen=True)
class PackReport:
    """What was written: how each scheme is held, the sizes, and the proof."""

    format: str
    held: list[str]
    exact: bool
    bits_per_weight: float
    quantized_bytes: int
    total_bytes: int
    verification: Verification

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "verification": self.verification.to_json()}


def plan(
    source: Checkpoint, form: Format, *, bits: int | None = None, allow_lossy: bool = False
) -> Plan:
    """How `form` would hold every quantized module. Raises RefusedError where it cannot.

    Raises InputError for a checkpoint with nothing quantized in it.
    """
    if not source.modules:
        raise InputError(
            f"{source.folder} is a dense checkpoint: there is nothing to pack; "
            "make a run of it with qexport train first."
        )
    verdicts = {}
    for module, (scheme, shape) in source.modules.items():
        verdict = form.verdict(scheme, shape, bits=bits, allow_lossy=allow_lossy)
        if verdict.holder is None:
            others = _holders(scheme, shape, form)
            instead = f" Formats that hold it exactly: {', '.join(others)}." if others else ""
            raise RefusedError(f"{module}: {verdict.reason}.{instead}")
        verdicts[module] = verdict
    return verdicts


def pack(
    source: Checkpoint,
    form: Format,
    out: Path,
    *,
    bits: int | None = None,
    allow_lossy: bool = False,
) -> PackReport:
    """Write `source` to the folder `out` in a layout, and verify what was written.

    The folder appears only when it is whole and, unless `allow_lossy`, exact. Raises RefusedError
    where the layout cannot hold the weights, InputError for an `out` that is not ours,
    VerificationError if the written file is not its source.
    """
    verdicts = plan(source, form, bits=bits, allow_lossy=allow_lossy)
    if source.folder.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out} is or holds the run itself; choose another -o.")
    check_writable(out, "packed")
    modules: Modules = {
        module: (_holder(verdicts[module]), shape) for module, (_, shape) in source.modules.items()
    }
    quantization = form.quantization_config(modules)
    with atomic_folder(out, "packed") as folder:
        quantized_bytes, total_bytes = _write(source, form, verdicts, folder)
        write_json(folder / "config.json", {**source.config, "quantization_config": quantization})
        for name, content in form.extra_files(quantization).items():
            write_json(folder / name, content)
        source.copy_files(folder)
        report = verify(source, open_checkpoint(folder))
        exact = all(verdict.exact for verdict in verdicts.values())
        if not report.rest_equal or (exact and not report.exact):
            raise VerificationError(
                f"what was written is not the run, and was removed: {report.describe()}."
            )
        weights = sum(out * inputs for _, (out, inputs) in modules.values())
        result = PackReport(
            format=form.name,
            held=holdings(source, verdicts),
            exact=report.exact,
            bits_per_weight=quantized_bytes * 8 / weights,
            quantized_bytes=quantized_bytes,
            total_bytes=total_bytes,
            verification=report,
        )
        mark(folder, "packed", **result.to_json())
    return result


def _holder(verdict: Verdict) -> Scheme:
    assert verdict.holder is not None
    return verdict.holder


def _holders(scheme: Scheme, shape: tuple[int, int], refused: Format) -> list[str]:
    """Every format and width that holds a matrix exactly, as one writes them."""
    found = []
    for form in FORMATS.values():
        widths = sorted({grid.bits for grid in form.grids})
        held = [b for b in widths if form.verdict(scheme, shape, bits=b).holder is not None]
        if held:
            found.append(f"{form.name} ({', '.join(map(str, held))} bits)")
    return found


def holdings(source: Checkpoint, verdicts: Plan) -> list[str]:
    """How each scheme of the source is held, a phrase each."""
    modules = source.modules
    return sorted({v.describe(modules[module][0]) for module, v in verdicts.items()})


def _write(source: Checkpoint, form: Format, verdicts: Plan, folder: Path) -> tuple[int, int]:
    """Stream every tensor into `folder`; returns bytes of the quantized ones, and of all."""
    writer = ShardWriter(folder)
    quantized_bytes = 0
    for name in source:
        tensor = source[name]
        if isinstance(tensor, Tensor):
            writer.add(name, tensor)
            continue
        module = module_of(name)
        held = _recode(tensor, _holder(verdicts[module]), module)
        before = writer.total_bytes
        for part, value in form.encode(module, held).items():
            writer.add(part, value)
        quantized_bytes += writer.total_bytes - before
    writer.close()
    return quantized_bytes, writer.total_bytes


def _recode(tensor: QuantizedTensor, holder: Scheme, module: str) -> QuantizedTensor:
    """`tensor` under the scheme `holder`: scales rounded where dtypes differ, codes embedded."""
    if tensor.scheme.scale_dtype != holder.scale_dtype:
        scales = tensor.scales.to(holder.scale_dtype)
        if not bool(scales.isfinite().all()) or bool((scales == 0).any()):
            raise RefusedError(f"{module}: a scale is out of the range of {holder.scale_dtype}.")
        scheme = replace(tensor.scheme, scale_dtype=holder.scale_dtype)
        tensor = QuantizedTensor(tensor.codes, scales, scheme, tensor.zeros)
    try:
        return tensor.embed(holder.grid)
    except ValueError as error:
        raise RefusedError(f"{module}: {error}; native holds it.") from error
