"""Mutated checkpoints against every reader: `python -m tests.fuzz --count 200000 --seed 0`.

Input number `n` of a seed is always the same one, so that what fails can be looked at again with
`--first n --count 1`. A reader may open a mutated file and read it all, or raise an error of ours;
anything else, codes that their grid does not have, two seconds, or memory beyond the file's size
and 256 MiB, is a finding.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from qexport.errors import QexportError
from qexport.formats import FORMATS, Options, open_checkpoint
from qexport.formats.pack import pack
from qexport.quantization import QuantizeConfig, quantize_model
from qexport.tensor import QuantizedTensor
from qexport.tiny import write_tiny_model
from tests.formats.models import decoder_layer, taken_by

SECONDS = 2
MEMORY = 256 << 20
NUMBERS: tuple[int, ...] = (
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    33,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
)
NUMBERS += (2**62, 2**63 - 1, 2**63, 2**64 - 1)
LEAVES: tuple[Any, ...] = (None, True, False, -1, 0, 1, 2**31, 2**63, 1e308, -0.5, "", "x", "../x")
LEAVES += (
    "a" * 5000,
    [],
    {},
    [1],
    [[]],
    {"a": 1},
    "float16",
    "seq2",
    "uint4",
    [0, 0],
    [2**31, 2**31],
)


class HangError(Exception):
    """An input took longer than it may."""


def bases(folder: Path) -> dict[str, Path]:
    """One small checkpoint of every format, and of the layouts that training reads and writes."""
    model = write_tiny_model(folder / "dense", num_hidden_layers=1)
    found = {"dense": model}
    for name, form in FORMATS.items():
        grid, group = taken_by(name)
        source = decoder_layer(model, grid, 64, group)
        pack(source, form, folder / name, Options())
        found[name] = folder / name
    pack(decoder_layer(model, "uint4", 64, 32), FORMATS["compressed-tensors"], folder / "asym")
    return {**found, "asym": folder / "asym", **quantized(model, folder)}


def quantized(model: Path, folder: Path) -> dict[str, Path]:
    """Scales that share one: of 8 bits in NF4, and in K-quants, with minima."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    wide = write_tiny_model(folder / "wide", **sizes)
    asked = {
        "nf4": QuantizeConfig(model, folder / "nf4", "nf4", "4", group_size=64),
        "kquant": QuantizeConfig(
            wide, folder / "kquant", "kquant", "4", calibration="builtin", samples=8, length=32
        ),
    }
    found = {}
    for name, config in asked.items():
        quantize_model(config, Console(quiet=True))
        found[name] = config.output
        for form in ("native", "bitsandbytes" if name == "nf4" else "gguf"):
            found[f"{name}-{form}"] = folder / f"{name}-{form}"
            pack(open_checkpoint(config.output), FORMATS[form], found[f"{name}-{form}"])
    return found


def mutate(rng: random.Random, folder: Path) -> str:
    """Change one file of a checkpoint in place; says which."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix != ".md"]
    weights = [file for file in files if file.suffix in (".safetensors", ".gguf")]
    (file,) = rng.choices([weights[0], folder / "config.json"], (3, 1))
    if file.suffix == ".json":
        value = json.loads(file.read_text())
        for _ in range(rng.randint(1, 3)):
            value = mutate_json(rng, value)
        file.write_text(json.dumps(value))
        return file.name
    data = bytearray(file.read_bytes())
    if file.suffix == ".safetensors" and rng.random() < 0.5:
        (length,) = struct.unpack_from("<Q", data)
        header = mutate_json(rng, json.loads(data[8 : 8 + length]))
        text = json.dumps(header).encode()
        data[: 8 + length] = struct.pack("<Q", len(text)) + text
    else:
        for _ in range(rng.randint(1, 4)):
            mutate_bytes(rng, data)
    file.write_bytes(data)
    return file.name


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Replace, remove, rename or copy something somewhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.15:
            return {
                rng.choice(["", "x", key + "x"]) if k == key else k: v for k, v in value.items()
            }
        if action < 0.2:
            return {**value, key: value[rng.choice(list(value))]}
        return {**value, key: mutate_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [*value[:index], mutate_json(rng, value[index]), *value[index + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, -value, value * 2, value * 2**32])
    return rng.choice(LEAVES)


def mutate_bytes(rng: random.Random, data: bytearray) -> None:
    """Flip, overwrite, remove, repeat or cut; mostly near the beginning, where headers are."""
    if len(data) < 16:
        return
    reach = len(data) if rng.random() < 0.3 else min(len(data), 12000)
    at = rng.randrange(reach - 8)
    action = rng.random()
    if action < 0.35:
        data[at] ^= 1 << rng.randrange(8)
    elif action < 0.75:
        number = rng.choice(NUMBERS)
        width = rng.choice([1, 2, 4, 8])
        data[at : at + width] = (number & (1 << 8 * width) - 1).to_bytes(width, "little")
    elif action < 0.85:
        del data[at : at + rng.choice([1, 4, 8, 100])]
    elif action < 0.95:
        data[at:at] = data[at : at + rng.choice([1, 4, 8, 100])]
    else:
        del data[at:]


def read(folder: Path, tokenizer: bool) -> str:
    """Open a checkpoint and read all of it; `opened` or the name of our error."""
    try:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint:
            held = checkpoint[name]
            if isinstance(held, QuantizedTensor):
                assert int(held.codes.max()) < held.scheme.grid.levels, name
        if tokenizer and checkpoint.make_tokenizer is not None:
            checkpoint.make_tokenizer()
    except QexportError as error:
        return type(error).__name__
    return "opened"


def limit_memory() -> None:
    """Let this process have no more than it has, 256 MiB and what a small file may take."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def fuzz(
    seed: int, first: int, count: int, tell: Callable[[str], None]
) -> tuple[Counter[str], list[str], float]:
    """Run inputs `first` to `first + count`: outcomes, findings, and the longest time."""

    def on_alarm(*_: object) -> None:
        raise HangError

    outcomes: Counter[str] = Counter()
    findings: list[str] = []
    longest = 0.0
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        originals = bases(Path(scratch) / "bases")
        for folder in originals.values():  # whatever is loaded lazily is loaded now
            read(folder, True)
        limits = resource.getrlimit(resource.RLIMIT_AS)
        limit_memory()
        previous = signal.signal(signal.SIGALRM, on_alarm)
        work = Path(scratch) / "work"
        try:
            for index in range(first, first + count):
                rng = random.Random(seed << 32 | index)
                name = rng.choice(sorted(originals))
                shutil.copytree(originals[name], work)
                file = mutate(rng, work)
                if rng.random() < 0.5 and name == "gguf":  # nothing beside the file
                    for other in work.iterdir():
                        if other.suffix != ".gguf":
                            other.unlink()
                started = time.monotonic()
                try:
                    signal.setitimer(signal.ITIMER_REAL, SECONDS)
                    outcomes[read(work, index % 50 == 0)] += 1
                except BaseException as error:  # whatever it is, it is a finding
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    where = traceback.format_exc().strip().splitlines()[-3:]
                    findings.append(f"{index} ({name}, {file}): {' | '.join(where)}")
                    tell(findings[-1])
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    shutil.rmtree(work)
                longest = max(longest, time.monotonic() - started)
                if index % 10000 == 9999:
                    tell(f"{index + 1 - first} inputs, {dict(outcomes)}")
        finally:
            signal.signal(signal.SIGALRM, previous)
            resource.setrlimit(resource.RLIMIT_AS, limits)
    return outcomes, findings, longest


def main() -> None:
    """Run and print; exit 1 if there was a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=10000)
    arguments = parser.parse_args()
    outcomes, findings, longest = fuzz(
        arguments.seed, arguments.first, arguments.count, lambda text: print(text, flush=True)
    )
    print(f"{dict(outcomes)}, {len(findings)} findings, the longest took {longest:.2f} s")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
