"""Packing a model of Llama-3-8B's shapes: memory, and speed beside a plain copy of the file.

`python benchmarks/pack.py` writes random 4-bit codes (groups of 128) shard by shard as a native
checkpoint, packs it through the command line, and measures each pack as a process: wall time to
the last byte on the disk, and the largest resident set. Copy and packs take turns, and the median
of the rounds is what counts. It takes some 20 GB of disk under --work.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import record
from qexport.checkpoint import Modules
from qexport.formats.native import Native
from qexport.grid import INT4, Scheme
from qexport.output import write_json
from qexport.shards import Parts, plan_shards
from qexport.stream import FileWriter
from qexport.tensor import portable
from qexport.tiny import write_tiny_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
LINEARS: dict[str, tuple[int, int]] = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
FORMATS = ("gptq", "compressed-tensors", "gguf")


def generate(folder: Path, layers: int) -> int:
    """Write the source, a tensor at a time in shards of 1 GiB; returns its bytes."""
    scheme = Scheme(INT4, 128)
    native = Native()
    modules: Modules = {
        f"model.layers.{layer}.{name}": (scheme, shape)
        for layer in range(layers)
        for name, shape in LINEARS.items()
    }
    parts: Parts = {"model.embed_tokens.weight": (torch.bfloat16, (128256, 4096))}
    for module, (_, shape) in modules.items():
        parts.update(native.parts(module, scheme, shape))
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            parts[f"model.layers.{layer}.{norm}.weight"] = (torch.bfloat16, (4096,))
    parts["model.norm.weight"] = (torch.bfloat16, (4096,))
    parts["lm_head.weight"] = (torch.bfloat16, (128256, 4096))
    write_tiny_model(folder)  # for its tokenizer
    (folder / "model.safetensors").unlink()
    files, index = plan_shards(parts, 1 << 30)
    generator = torch.Generator().manual_seed(0)
    with FileWriter(folder, files) as writer:
        for name, (dtype, sides) in parts.items():
            if dtype == torch.uint8:
                tensor = torch.randint(0, 256, sides, generator=generator, dtype=dtype)
            elif dtype == torch.float16:
                tensor = portable(torch.rand(sides, generator=generator) * 0.01 + 0.001).half()
            else:
                tensor = torch.randn(sides, generator=generator).to(dtype)
            writer.write(name, tensor)
        writer.sync()
    for name, content in index.items():
        write_json(folder / name, content)
    own = Native().quantization_config(modules, None)  # type: ignore[arg-type]
    write_json(
        folder / "config.json", {**CONFIG, "num_hidden_layers": layers, "quantization_config": own}
    )
    return sum(plan.size for plan in files)


def copy(source: Path, target: Path) -> float:
    """Seconds that `cp` takes for the source's shards, until they are on the disk."""
    target.mkdir()
    started = time.monotonic()
    subprocess.run(["cp", *map(str, source.glob("*.safetensors")), str(target)], check=True)
    for file in target.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def pack(source: Path, form: str, target: Path) -> dict[str, Any]:
    """Pack in a process of its own; its time, peak memory and report."""
    command = [sys.executable, "-m", "qexport", "pack", str(source), "--format", form, "--json"]
    started = time.monotonic()
    process = subprocess.Popen([*command, "-o", str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    report = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    shutil.rmtree(target)
    return {
        "seconds": seconds,
        "peak_bytes": usage.ru_maxrss * 1024,
        "exact": report["exact"],
        "total_bytes": report["total_bytes"],
    }


def _row(form: str, runs: list[dict[str, Any]], size: int, copied: float) -> dict[str, Any]:
    """Medians of one format's runs, printed."""
    times = [run["seconds"] for run in runs]
    seconds = statistics.median(times)
    row = {
        "format": form,
        "seconds": times,
        "source_gb_per_s": size / seconds / 1e9,
        "of_copy": copied / seconds,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "exact": all(run["exact"] for run in runs),
        "total_bytes": runs[0]["total_bytes"],
    }
    print(
        f"{form}: {seconds:.1f} s ({', '.join(f'{s:.1f}' for s in times)}), "
        f"{row['source_gb_per_s']:.2f} GB/s of source, {row['of_copy']:.2f} of cp, "
        f"peak {row['peak_bytes'] / 1e9:.2f} GB, exact {row['exact']}"
    )
    return row


def main() -> None:
    """Generate, copy, pack in every format, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("pack-benchmark"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir()
    try:
        # in a process of its own: a child's peak memory begins with that of its parent
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            size = pool.submit(generate, work / "source", arguments.layers).result()
        copies: list[float] = []
        packs: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMATS}
        for _ in range(arguments.rounds):
            copies.append(copy(work / "source", work / "copy"))
            for form, runs in packs.items():
                runs.append(pack(work / "source", form, work / "out"))
        copied = statistics.median(copies)
        print(
            f"source {size / 1e9:.2f} GB; cp {size / copied / 1e9:.2f} GB/s "
            f"({', '.join(f'{seconds:.1f}' for seconds in copies)} s)"
        )
        rows = [_row(form, runs, size, copied) for form, runs in packs.items()]
        result = {"layers": arguments.layers, "source_bytes": size, "copy_s": copies, "rows": rows}
        print(record("pack", result))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
