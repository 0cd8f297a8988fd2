"""From a checkpoint to a packed folder: choose holders, stream, prove, then let it be seen.

One tensor is in memory at a time, or two that together are no larger than the largest. Each is
read, its bytes are put at their place, and the file is read back through the format's own reader
and compared; only then is it entered in a journal. A killed pack goes on after the last entry.
"""

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from threading import Condition, Lock
from typing import Any

import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint, Entry, module_of
from qexport.errors import InputError, RefusedError, VerificationError
from qexport.formats.base import EMBEDDINGS, Format, Layout, Options, Plan, ReadBack, Verdict
from qexport.formats.card import model_card
from qexport.formats.holders import holders
from qexport.formats.registry import open_checkpoint
from qexport.formats.verify import Verification, compare, compare_rest
from qexport.grid import Scheme, dtype_name
from qexport.output import check_writable, mark, resumable_folder, write_json
from qexport.stream import FileWriter, as_bytes
from qexport.tensor import QuantizedTensor
from qexport.version import __version__

__all__ = ["PackReport", "check_output", "holdings", "pack", "plan", "rehearse"]

Stored = Tensor | QuantizedTensor
_SYNC_BYTES = 1 << 28  # at most so much is written again after a kill
_WORKERS = 2  # while one waits for the disk, the other reckons


@dataclass(frozen=True)
class PackReport:
    """What was written: how each scheme is held, the sizes, and the proof.

    verdicts        of every scheme: {scheme, held, verdict, stored, bits_per_weight, modules}
    source_sha256   of every tensor of the source, by name: of a dense one's bytes, or of a
                    quantized one's scheme, codes, scales and zero points, whatever their layout
    """

    format: str
    held: list[str]
    verdicts: list[dict[str, Any]]
    exact: bool
    bits_per_weight: float
    quantized_bytes: int
    total_bytes: int
    verification: Verification
    source_sha256: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "verification": self.verification.to_json()}


def plan(source: Checkpoint, form: Format, options: Options | None = None) -> dict[str, Verdict]:
    """How `form` would hold every quantized module. Raises RefusedError where it cannot.

    Raises InputError for a checkpoint with nothing quantized in it, or an option of another format.
    """
    options = options or Options()
    form.check_options(options)
    if not source.modules:
        raise InputError(
            f"{source.folder} is a dense checkpoint: there is nothing to pack; "
            "make a run of it by qexport train or quantize."
        )
    verdicts = {}
    for module, (scheme, shape) in source.modules.items():
        verdict = form.verdict(scheme, shape, options)
        if verdict.holder is None:
            others = holders(source)
            held = f" Formats that hold it exactly: {', '.join(others)}." if others else ""
            raise RefusedError(f"{module}: {verdict.reason}.{held}")
        verdicts[module] = verdict
    return verdicts


def check_output(source: Checkpoint, out: Path) -> None:
    """Raise InputError where nothing can be packed to the folder `out`."""
    if source.folder.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out} is or holds the run itself; choose another -o.")
    check_writable(out, "packed")


def pack(source: Checkpoint, form: Format, out: Path, options: Options | None = None) -> PackReport:
    """Write `source` to the folder `out` in a layout, and prove what was written.

    The folder appears only when it is whole and, unless scales may be rounded, exact. Raises
    RefusedError where the layout cannot hold the weights, InputError for an `out` that is not
    ours, VerificationError if the written file is not its source.
    """
    options = options or Options()
    verdicts = plan(source, form, options)
    check_output(source, out)
    layout = form.layout(source, verdicts, options)
    with resumable_folder(out, "packed", _fingerprint(source, form, options, layout)) as folder:
        for name, content in layout.json.items():
            write_json(folder / name, content)
        source.copy_files(folder)
        records = _write(source, verdicts, layout, folder)
        report = Verification()
        for record in records.values():
            report.add(Verification(**record["counts"]))
        report.add(compare_rest(source, open_checkpoint(folder)))
        _judge(records, report, verdicts, options)
        result = _report(source, form, verdicts, records, report)
        (folder / "README.md").write_text(model_card(source, result.to_json()), encoding="utf-8")
        mark(folder, "packed", **result.to_json())
    return result


def _write(
    source: Checkpoint, verdicts: Plan, layout: Layout, folder: Path
) -> dict[str, dict[str, Any]]:
    """Write and read back every tensor; returns hash, bytes and counts of each by name."""
    room = _Room(max(_memory(entry) for entry in source.entries.values()))
    with (
        _one_thread(),
        FileWriter(folder, layout.files) as writer,
        ThreadPoolExecutor(_WORKERS) as workers,
        ThreadPoolExecutor(_WORKERS) as hashers,
    ):
        for name, own in layout.extra.items():
            writer.write(name, own)
        read_back = layout.reopen(folder)
        journal = _Journal(folder / ".journal", writer)

        def write_one(name: str) -> None:
            entry = source.entries[name]
            verdict = verdicts.get(module_of(name)) if entry.scheme else None
            with room.taken(_memory(entry)):
                record = _write_one(name, verdict, source, layout, writer, hashers, read_back)
            journal.add(name, record)

        for _ in workers.map(write_one, [name for name in source if name not in journal.records]):
            pass
        journal.flush()
        return journal.records


def _memory(entry: Entry) -> int:
    """Bytes of a tensor while it is packed: a code takes one."""
    return prod(entry.shape) * (1 if entry.scheme else entry.dtype.itemsize)


class _Room:
    """Memory for one tensor of the largest size, or for several that together take no more."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._freed = Condition()
        self._first = Lock()  # held by who waits longest, so that a large tensor's turn comes

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        with self._first, self._freed:
            self._freed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._freed:
                self._free += size
                self._freed.notify()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: its pieces of work are short, and on a machine with other work
    the threads wait for one another three times as long as they work (docs/log.md)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_one(
    name: str,
    verdict: Verdict | None,
    source: Checkpoint,
    layout: Layout,
    writer: FileWriter,
    hashers: ThreadPoolExecutor,
    read_back: ReadBack,
) -> dict[str, Any]:
    """Put one tensor at its place and compare what is there; nothing of it stays in memory."""
    tensor = source[name]
    digest = hashers.submit(_hash, tensor)
    held: Stored = tensor if verdict is None else _recode(tensor, verdict, name)
    parts = layout.encode(name, held, verdict)
    size = sum(writer.write(part, value) for part, value in parts.items())
    del held, parts
    counts = compare(name, tensor, read_back(name, source.entries[name], verdict))
    return {"sha256": digest.result(), "bytes": size, "counts": asdict(counts)}


class _Journal:
    """What has been written and proven, a line each; a line stands only for bytes on the disk."""

    def __init__(self, path: Path, writer: FileWriter) -> None:
        self.records: dict[str, dict[str, Any]] = dict(_entries(path))
        whole = [json.dumps([name, record]) + "\n" for name, record in self.records.items()]
        path.write_text("".join(whole), encoding="utf-8")  # without a torn last line
        self._path = path
        self._writer = writer
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._lock = Lock()

    def add(self, name: str, record: dict[str, Any]) -> None:
        with self._lock:
            self.records[name] = record
            self._pending.append(json.dumps([name, record]) + "\n")
            self._pending_bytes += record["bytes"]
            if self._pending_bytes >= _SYNC_BYTES:
                self.flush()

    def flush(self) -> None:
        self._writer.sync()
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(self._pending)
        self._pending, self._pending_bytes = [], 0


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            name, record = json.loads(line)
        except ValueError:  # the line that was being written when the process died
            return
        yield name, record


def _fingerprint(source: Checkpoint, form: Format, options: Options, layout: Layout) -> str:
    """What makes two packs the same one: the source's files, and all that decides the output."""
    folder = source.folder
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    states = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    headers = [(plan.name, sha256(plan.header).hexdigest()) for plan in layout.files]
    said = [__version__, form.name, asdict(options), str(folder.resolve()), states, headers]
    return json.dumps(said)


def _judge(
    records: dict[str, dict[str, Any]], report: Verification, verdicts: Plan, options: Options
) -> None:
    """Raise VerificationError where the written file is less than was promised."""
    broken = [
        name
        for name, record in records.items()
        if not _keeps(name, Verification(**record["counts"]), verdicts, options)
    ]
    if broken or not report.others_equal:
        where = f" (first in {broken[0]})" if broken else ""
        raise VerificationError(
            f"what was written is not the run, and was removed: {report.describe()}{where}."
        )


def _keeps(name: str, counts: Verification, verdicts: Plan, options: Options) -> bool:
    """Whether one tensor is as exact as was promised of it."""
    if counts.differing_dense:
        return name in EMBEDDINGS and options.embeddings != "exact"
    verdict = verdicts.get(module_of(name)) if counts.modules else None
    if verdict is None or verdict.exact:
        return counts.values_exact
    return counts.differing_codes == 0 and counts.largest_ulp <= verdict.bound


def _report(
    source: Checkpoint,
    form: Format,
    verdicts: Plan,
    records: dict[str, dict[str, Any]],
    report: Verification,
) -> PackReport:
    modules = source.modules
    quantized = sum(records[f"{module}.weight"]["bytes"] for module in modules)
    weights = sum(out * inputs for _, (out, inputs) in modules.values())
    return PackReport(
        format=form.name,
        held=holdings(source, verdicts),
        verdicts=_verdicts(source, verdicts),
        exact=report.exact,
        bits_per_weight=quantized * 8 / weights,
        quantized_bytes=quantized,
        total_bytes=sum(record["bytes"] for record in records.values()),
        verification=report,
        source_sha256={name: records[name]["sha256"] for name in source},
    )


def rehearse(source: Checkpoint, form: Format, options: Options | None = None) -> Plan:
    """Everything that `pack` does before it writes, tensor by tensor; raises what that does."""
    options = options or Options()
    verdicts = plan(source, form, options)
    layout = form.layout(source, verdicts, options)
    for name in source:
        tensor, verdict = source[name], verdicts.get(module_of(name))
        if isinstance(tensor, QuantizedTensor) and verdict is not None:
            tensor = _recode(tensor, verdict, name)
        layout.encode(name, tensor, verdict)
    return verdicts


def holdings(source: Checkpoint, verdicts: Plan) -> list[str]:
    """How each scheme of the source is held, a phrase each with the bits that it comes to."""
    totals: dict[str, tuple[float, int]] = {}
    for module, (scheme, (out, inputs)) in source.modules.items():
        phrase = verdicts[module].describe(scheme)
        stored, weights = totals.get(phrase, (0.0, 0))
        stored += verdicts[module].bits_per_weight * out * inputs
        totals[phrase] = stored, weights + out * inputs
    return sorted(
        f"{phrase}, {stored / weights:.4g} bits per weight"
        for phrase, (stored, weights) in totals.items()
    )


def _verdicts(source: Checkpoint, verdicts: Plan) -> list[dict[str, Any]]:
    groups: dict[tuple[Scheme, Verdict], list[str]] = {}
    for module, verdict in verdicts.items():
        groups.setdefault((source.modules[module][0], verdict), []).append(module)
    return [
        {
            "scheme": scheme.to_json(),
            "verdict": verdict.kind(scheme),
            "held": verdict.describe(scheme),
            "stored": verdict.stored,
            "bits_per_weight": verdict.bits_per_weight,
            "bound_ulp": verdict.bound,
            "modules": len(modules),
        }
        for (scheme, verdict), modules in groups.items()
    ]


def _recode(tensor: Stored, verdict: Verdict, name: str) -> QuantizedTensor:
    """`tensor` on its holder's grid: scales rounded where dtypes differ, codes embedded."""
    holder = verdict.holder
    assert isinstance(tensor, QuantizedTensor)
    assert holder is not None
    if tensor.scheme.scale_dtype != holder.scale_dtype:
        scales = tensor.scales.to(holder.scale_dtype)
        smallest = torch.finfo(holder.scale_dtype).tiny  # below it a rounding may cost all bits
        if not bool(scales.isfinite().all()) or bool((scales.abs() < smallest).any()):
            raise RefusedError(
                f"{module_of(name)}: a scale is beyond {dtype_name(holder.scale_dtype)}'s normal "
                "numbers, where it would lose more than a rounding; native holds it."
            )
        scheme = replace(tensor.scheme, scale_dtype=holder.scale_dtype)
        tensor = replace(tensor, scales=scales, scheme=scheme)
    try:
        return tensor.embed(holder.grid)
    except ValueError as error:
        raise RefusedError(f"{module_of(name)}: {error}; native holds it.") from error


def _hash(tensor: Stored) -> str:
    if isinstance(tensor, QuantizedTensor):
        digest = sha256(json.dumps(tensor.scheme.to_json()).encode())
        for part in (tensor.codes, tensor.scales, tensor.zeros, tensor.minima):
            if part is not None:
                digest.update(as_bytes(part))
        return digest.hexdigest()
    return sha256(as_bytes(tensor)).hexdigest()
