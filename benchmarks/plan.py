"""What `qexport plan --cpu here` says beside what `qexport bench latency` measures.

`python -m benchmarks.plan [--shape 1b]` takes SmolLM2, or a random model of Llama-3.2-1B's shape,
in bfloat16 and with int4, SEQ-2 and int8 weights in groups of 64 (int8: per channel). The plan sees
its config.json alone. Compared are a prompt's time to its first token, a step's at each batch, the
memory of the process with the largest batch, and the batch from which on packed weights take nine
tenths of bfloat16's time, and of int8's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.decode import dense_model, rounded
from benchmarks.machine import record
from qexport.checkpoint import read_config
from qexport.formats import FORMATS
from qexport.formats.pack import pack
from qexport.grid import GRIDS, Scheme
from qexport.runtime.bench.contender import Contender
from qexport.runtime.bench.latency import Settings, measure_latency
from qexport.runtime.bench.noise import Noise
from qexport.runtime.families import DecoderConfig, decoder_config
from qexport.runtime.plan import Model, Times, crossover, memory_bytes
from qexport.runtime.timing import Measured, measure_times

PROMPT, MADE = 128, 32
SCHEMES: dict[str, Scheme | None] = {
    "seq2": Scheme(GRIDS["seq2"], 64),
    "int4": Scheme(GRIDS["int4"], 64),
    "int8": Scheme(GRIDS["int8"]),
    "bfloat16": None,
}


def empty_process(folder: Path) -> int:
    """Bytes of a process that has loaded what serves and no model, as `qexport plan` has it."""
    named = ("--bits", "4", "--cpu", "epyc-9654", "--json")
    command = [sys.executable, "-m", "qexport", "plan", str(folder), *named]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return int(found["runtime_bytes"])


def predicted(folder: Path, batches: tuple[int, ...], noise: Noise) -> dict[str, Any]:
    """Of each scheme: {ttft, step, memory}."""
    fields = read_config(folder)
    sizes = decoder_config(fields)
    assert isinstance(sizes, DecoderConfig)
    base, model = empty_process(folder), Model(sizes)
    context = PROMPT + MADE // 2
    found: dict[str, Any] = {}
    for name, scheme in SCHEMES.items():
        times = measure_times(fields, scheme, batches, context, PROMPT, noise)
        found[name] = {
            "ttft": times.prompt_seconds(PROMPT),
            "step": {batch: times.decode_seconds(batch, context) for batch in batches},
            "memory": base + memory_bytes(model, scheme, max(batches), PROMPT + MADE),
        }
        print(name, "predicted", flush=True)
    return found


def measured(
    folders: dict[str, Path], batches: tuple[int, ...], repeats: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of whole models through the generator; and the whole report."""
    contenders = [Contender("native", folder) for folder in folders.values()]
    settings = Settings(batches, (PROMPT,), (MADE,), repeats=repeats)
    report = measure_latency(contenders, settings, print)
    found: dict[str, Any] = {}
    for name, contender in zip(folders, contenders, strict=True):
        cells = [cell for cell in report["cells"] if cell["contender"] == contender.name]
        about = next(one for one in report["contenders"] if one["name"] == contender.name)
        found[name] = {
            "ttft": cells[0]["ttft"]["p50"],
            "step": {cell["batch"]: cell["itl"]["p50"] for cell in cells},
            "memory": about["peak_memory_bytes"],
        }
    return found, report


def crossovers(steps: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Of each packed scheme against bfloat16 and int8."""
    sides: dict[str, Times] = {name: Measured(found, 0.0) for name, found in steps.items()}
    most = max(steps["bfloat16"])
    others = {name: sides[name] for name in ("bfloat16", "int8")}
    return {name: crossover(sides[name], others, 0, most) for name in ("seq2", "int4")}


def main() -> None:
    """Plan, measure, compare and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["smollm2", "1b"], default="smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    batches = (1, 2, 4, 8, 16, 32)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dense = dense_model(asked.shape, work)
        noise = Noise()
        plan = predicted(dense.folder, batches, noise)
        folders = {"bfloat16": dense.folder}
        for name, scheme in SCHEMES.items():
            if scheme is not None:
                folders[name] = work / name
                size = scheme.group_size
                pack(rounded(dense, scheme.grid.name, size), FORMATS["native"], folders[name])
        found, report = measured(folders, batches, asked.repeats)
    ratios = {
        name: {
            "ttft": plan[name]["ttft"] / found[name]["ttft"],
            "step": {b: plan[name]["step"][b] / found[name]["step"][b] for b in batches},
            "memory": plan[name]["memory"] / found[name]["memory"],
        }
        for name in SCHEMES
    }
    result = {
        "prompt": PROMPT,
        "tokens": MADE,
        "noise": {"predicted": noise.reasons(), "measured": report["noise"]["reasons"]},
        "predicted": plan,
        "measured": found,
        "predicted_over_measured": ratios,
        "weight_only_pays_below": {
            "predicted": crossovers({name: plan[name]["step"] for name in SCHEMES}),
            "measured": crossovers({name: found[name]["step"] for name in SCHEMES}),
        },
    }
    print(json.dumps({name: result[name] for name in list(result)[-2:]}, indent=2))
    print(record(f"plan-{asked.shape}", result))


if __name__ == "__main__":
    main()
