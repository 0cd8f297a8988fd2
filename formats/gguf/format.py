"""The GGUF format: `model.gguf` in a folder, and files of llama.cpp's own making."""

import json
import math
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.checkpoint import (
    CONFIG_VERSION,
    Checkpoint,
    Entry,
    Modules,
    module_of,
    modules_to_json,
    read_config,
)
from qexport.errors import CheckpointError, InputError, RefusedError
from qexport.formats.base import EMBEDDINGS, Format, Layout, Options, Plan, ReadBack, Verdict
from qexport.formats.gguf.block import Block
from qexport.formats.gguf.blocks import BLOCKS, BY_ID
from qexport.formats.gguf.container import GgufFile, Value, plan_file
from qexport.formats.gguf.entries import (
    DENSE_IDS,
    ROWS,
    SCHEMES,
    entry_of,
    schemes_of,
)
from qexport.formats.gguf.hparams import (
    ROPE_TENSORS,
    config_of,
    family_of,
    hparams,
    rope_tensors,
    rows_of,
)
from qexport.formats.gguf.k_blocks import SuperBlocked
from qexport.formats.gguf.names import Rows, from_gguf, to_gguf
from qexport.formats.gguf.rounding import round_to_q6_k, round_to_q8_0
from qexport.formats.gguf.verdict import keeps_grid, verdict_of
from qexport.formats.gguf.vocabulary import tokenizer_of, vocabulary
from qexport.grid import Grid, Scheme
from qexport.stream import as_bytes
from qexport.tensor import QuantizedTensor
from qexport.version import __version__

__all__ = ["Gguf"]

_FILE = "model.gguf"
_DENSE_FILE_TYPES = {0: 0, 1: 1, 30: 32}
_ROUNDED = {"q8_0": round_to_q8_0, "q6_k": round_to_q6_k}


class Gguf(Format):
    """One file, everything in it."""

    name = "gguf"
    blocks = tuple(BLOCKS)
    grids: ClassVar[tuple[Grid, ...]] = tuple(
        sorted({g for b in BLOCKS.values() for g in b.holds}, key=lambda grid: grid.levels)
    )

    def detect(self, path: Path) -> bool:
        if path.is_file():
            with path.open("rb") as file:
                return file.read(4) == b"GGUF"
        return bool(_files(path)) and not any(path.glob("*.safetensors"))

    def verdict(self, scheme: Scheme, shape: tuple[int, int], options: Options) -> Verdict:
        return verdict_of(scheme, shape[1], options)

    def layout(self, source: Checkpoint, plan: Plan, options: Options) -> Layout:
        _check_tensors(source)
        if options.embeddings in _ROUNDED and not options.allow_lossy:
            raise RefusedError(
                f"--embeddings {options.embeddings} rounds them; --allow-lossy lets it."
            )
        tensors: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for name, entry in source.entries.items():
            theirs = to_gguf(name)
            assert theirs is not None
            verdict = plan.get(module_of(name)) if entry.scheme else None
            tensors[theirs] = _place(name, entry, verdict, options)
        extra = rope_tensors(source.config)
        tensors.update({n: (0, tuple(t.shape), 4 * t.numel()) for n, t in extra.items()})
        metadata = _metadata(source, plan, tensors)
        rows = rows_of(source.config)
        return Layout(
            [plan_file(_FILE, metadata, tensors)],
            {"config.json": source.config},
            extra,
            partial(_encode, rows, options),
            partial(_reopen, rows),
        )

    def read(self, path: Path) -> Checkpoint:
        file = GgufFile(_only_file(path))
        if file.integer("split.count", 1) > 1:
            raise InputError(f"{file.path} is one of several parts; join them with llama.cpp.")
        beside = path.is_dir() and (path / "config.json").is_file()
        config = _checked_config(file, read_config(path)) if beside else config_of(file)
        rows = rows_of(config)
        schemes = schemes_of(file)
        entries = {}
        for theirs, info in file.tensors.items():
            name = from_gguf(theirs)
            if name is None and theirs not in ROPE_TENSORS:
                raise CheckpointError(f"{file.path} has the tensor {theirs[:80]!r}, unknown here.")
            if name is not None:
                entries[name] = entry_of(file, name, info, rows, schemes.pop(module_of(name), None))
        if schemes:
            raise file.damaged(f"it promises {next(iter(schemes))[:80]} and lacks it")
        checkpoint = Checkpoint(path, self.name, config, entries)
        if not (path.is_dir() and (path / "tokenizer.json").is_file()):
            checkpoint.make_tokenizer = partial(tokenizer_of, file)
        return checkpoint

    def differences(self, source: Checkpoint, artefact: Checkpoint) -> list[str]:
        """Metadata of the file, tokenizer included, that is not what the source says."""
        file = GgufFile(_only_file(artefact.folder))
        theirs = GgufFile(_only_file(source.folder)) if source.layout == self.name else None
        expected = {**hparams(source.config), **_vocabulary(source)}
        parts = (f"{family_of(source.config).arch}.", "tokenizer.")
        said = {key for one in (file, *([theirs] if theirs else ())) for key in one}
        found = [
            key
            for key in {key for key in said if key.startswith(parts)} | set(expected)
            if not _says(file, key, expected.get(key))
            and not (theirs and _alike(file, theirs, key))
        ]
        factors = rope_tensors(source.config)
        there = {*factors, *(name for name in ROPE_TENSORS if name in file.tensors)}
        found += [n for n in there if n not in factors or not _holds(file, n, factors[n])]
        return sorted(found)


def _says(file: GgufFile, key: str, value: Value | None) -> bool:
    return value is not None and file.raw(key) == value.encode()


def _alike(file: GgufFile, other: GgufFile, key: str) -> bool:
    """Whether two files say the same; one that lacks what the other has says something else."""
    return (key in file) == (key in other) and (key not in file or file.raw(key) == other.raw(key))


def _holds(file: GgufFile, name: str, values: Tensor) -> bool:
    if name not in file.tensors or file.tensors[name].shape != tuple(values.shape):
        return False
    return bytes(file.data(name, 4 * values.numel())) == bytes(as_bytes(values))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf"))


def _only_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = _files(path)
    if len(files) != 1:
        raise InputError(f"{path} has {len(files)} GGUF files; give the one that is meant.")
    return files[0]


def _check_tensors(source: Checkpoint) -> None:
    """Refuse tensors that llama.cpp would leave out, or a head that it would not look for."""
    family = family_of(source.config)
    for name in source:
        module, _, leaf = name.rpartition(".")
        if to_gguf(name) is None or (leaf == "bias" and not module.endswith(family.biases)):
            raise RefusedError(f"gguf has no place for {name} in {family.arch}; native holds it.")
    tied = bool(source.config.get("tie_word_embeddings", False))
    if tied == ("lm_head.weight" in source):
        raise RefusedError(
            f"config.json says tie_word_embeddings {tied}, and there is "
            f"{'a' if tied else 'no'} lm_head.weight; llama.cpp goes by the tensor."
        )


def _place(
    name: str, entry: Entry, verdict: Verdict | None, options: Options
) -> tuple[int, tuple[int, ...], int]:
    """Type, shape and bytes of a tensor in the file."""
    elements = math.prod(entry.shape)
    block = BLOCKS[verdict.stored] if verdict is not None else _rounded(name, entry, options)
    if block is not None:
        return block.id, entry.shape, elements // block.size * block.bytes
    dtype = _dense_dtype(name, entry.dtype, entry.shape, options)
    return DENSE_IDS[dtype], entry.shape, elements * dtype.itemsize


def _rounded(name: str, entry: Entry, options: Options) -> Block | None:
    """The block type that a dense embedding is rounded to, where that was asked for."""
    if name not in EMBEDDINGS or options.embeddings not in _ROUNDED:
        return None
    block = BLOCKS[options.embeddings.upper()]
    if entry.shape[1] % block.size:
        raise RefusedError(
            f"--embeddings {options.embeddings} wants rows of a multiple of {block.size}, and "
            f"{name} has {entry.shape[1]}."
        )
    return block


def _dense_dtype(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], options: Options
) -> torch.dtype:
    """llama.cpp wants vectors in float32; matrices may stay what they are."""
    if len(shape) == 1:
        return torch.float32
    if name in EMBEDDINGS and options.embeddings == "f16":
        return torch.float16
    if dtype not in DENSE_IDS:
        raise RefusedError(f"gguf does not hold {name} of {dtype}; native does.")
    return dtype


def _metadata(
    source: Checkpoint, plan: Plan, tensors: dict[str, tuple[int, tuple[int, ...], int]]
) -> dict[str, Value]:
    kinds = Counter(kind for kind, shape, _ in tensors.values() if len(shape) == 2)
    common = kinds.most_common(1)[0][0] if kinds else 0
    block = BY_ID.get(common)
    file_type = block.file_type if block else _DENSE_FILE_TYPES[common]
    modules: Modules = {
        module: (verdict.holder, source.modules[module][1])
        for module, verdict in plan.items()
        if verdict.holder is not None and keeps_grid(verdict)
    }
    schemes = {"version": CONFIG_VERSION, "config_groups": modules_to_json(modules)}
    config = source.config
    name = config.get("_name_or_path") or config.get("_model_name_or_path") or config["model_type"]
    return {
        "general.architecture": Value("str", family_of(config).arch),
        "general.type": Value("str", "model"),
        "general.name": Value("str", str(name)[:200]),
        "general.file_type": Value("u32", file_type),
        "general.quantization_version": Value("u32", 2),
        **hparams(config),
        **_vocabulary(source),
        "qexport.version": Value("str", __version__),
        SCHEMES: Value("str", json.dumps(schemes)),
    }


def _vocabulary_size(source: Checkpoint) -> int:
    """As config.json has it. Raises CheckpointError where the embeddings are not as many."""
    embeddings = source.entries.get("model.embed_tokens.weight")
    if embeddings is None:
        raise CheckpointError(f"{source.folder} has no model.embed_tokens.weight; it is not whole.")
    said, rows = source.config["vocab_size"], embeddings.shape[0]
    if said != rows:
        raise CheckpointError(
            f"config.json's vocab_size is {str(said)[:40]}, and there are {rows} embeddings."
        )
    return rows


def _vocabulary(source: Checkpoint) -> dict[str, Value]:
    size = _vocabulary_size(source)
    if source.make_tokenizer is None:
        return vocabulary(source.folder, size)
    with tempfile.TemporaryDirectory() as folder:
        source.make_tokenizer().save_pretrained(folder)
        return vocabulary(Path(folder), size)


def _encode(
    rows: Rows,
    options: Options,
    name: str,
    tensor: Tensor | QuantizedTensor,
    verdict: Verdict | None,
) -> dict[str, Tensor]:
    theirs = to_gguf(name)
    assert theirs is not None
    ordered = rows.to_file(name, tensor)
    if isinstance(ordered, QuantizedTensor):
        assert verdict is not None
        try:
            return {theirs: _encode_blocks(BLOCKS[verdict.stored], ordered)}
        except ValueError as error:
            raise RefusedError(f"{module_of(name)}: {error}; native holds it.") from error
    if name in EMBEDDINGS and options.embeddings in _ROUNDED:
        step = max(1, ROWS // ordered.shape[1])
        starts = range(0, ordered.shape[0], step)
        try:
            rounded = [_ROUNDED[options.embeddings](ordered[i : i + step]) for i in starts]
        except ValueError as error:
            raise RefusedError(f"{name}: {error}; native holds it.") from error
        return {theirs: torch.cat(rounded)}
    dtype = _dense_dtype(name, ordered.dtype, tuple(ordered.shape), options)
    stored = ordered.to(dtype)
    if stored is ordered:
        return {theirs: stored}
    if bool(stored.isfinite().all()) < bool(ordered.isfinite().all()):
        raise RefusedError(f"{name} has values beyond the range of {dtype}; native holds them.")
    may = name in EMBEDDINGS  # they alone
    other = "--allow-lossy rounds it" if may else "native holds it"
    if not (may and options.allow_lossy) and not torch.equal(stored.to(ordered.dtype), ordered):
        raise RefusedError(f"{name} does not fit {dtype} exactly; {other}.".replace("torch.", ""))
    return {theirs: stored}


def _encode_blocks(block: Block, tensor: QuantizedTensor) -> Tensor:
    out, inputs = tensor.shape
    blocks = inputs // block.size
    shared = tensor.scheme.super_block
    data = torch.empty(out, blocks, block.bytes, dtype=torch.uint8)
    step = max(1, ROWS // inputs)
    for first in range(0, out, step):
        part = tensor.rows(slice(first, first + step))
        codes = part.codes.view(-1, blocks, block.size)
        if shared is not None:
            assert isinstance(block, SuperBlocked)
            scales = part.scales.view(len(codes), blocks, -1)
            minima = None if part.minima is None else part.minima.view(scales.shape)
            encoded = block.encode_super(shared, codes, scales, minima)
        else:
            per_group = blocks // part.scales.shape[1]
            scales = part.scales.repeat_interleave(per_group, 1)
            zeros = None if part.zeros is None else part.zeros.repeat_interleave(per_group, 1)
            encoded = block.encode(tensor.scheme.grid, codes, scales, zeros)
        data[first : first + step] = encoded
    return data


def _reopen(rows: Rows, folder: Path) -> ReadBack:
    file = GgufFile(folder / _FILE)

    def read_back(name: str, _: Entry, verdict: Verdict | None) -> Tensor | QuantizedTensor:
        info = file.tensors[to_gguf(name) or name]
        known = None
        if verdict is not None and verdict.holder is not None and keeps_grid(verdict):
            known = verdict.holder, (info.shape[0], info.shape[1])
        return entry_of(file, name, info, rows, known).load()

    return read_back


def _checked_config(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """The config.json beside a file, once the file's metadata says the same."""
    expected = hparams(config)
    scaling = f"{family_of(config).arch}.rope.scaling."
    for key in {*expected, *(key for key in file if key.startswith(scaling))} & {*file}:
        if not _says(file, key, expected.get(key)):
            raise CheckpointError(
                f"{file.path} and the config.json beside it differ in {key}; remove the one that "
                "does not belong."
            )
    return config
