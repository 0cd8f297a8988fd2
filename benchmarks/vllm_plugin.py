"""Decoding in vLLM's CPU build: its own 4-bit kernel beside ours behind the plugin.

`python -m benchmarks.vllm_plugin [--shape 1b]` packs one model's int4 codes as GPTQ, which vLLM
multiplies with its own kernel, and natively, which the plugin gives to ours; and SEQ at 2 bits.
Each runs in a vLLM of its own, in turns; bfloat16, compiled and with its threads as vLLM does by
default (of two cores one computes, and one is its scheduler's), one sequence and eight.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.decode import VLLM, dense_model, rounded
from benchmarks.machine import record
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack

MADE = 64
_CODE = """
import sys, time
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=512, max_num_seqs=8)
made = int(sys.argv[3])
def run(batch, count):
    start = time.perf_counter()
    tokens = [{"prompt_token_ids": [i + 1, i + 2, i + 3]} for i in range(batch)]
    wanted = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0)
    llm.generate(tokens, wanted, use_tqdm=False)
    return time.perf_counter() - start
run(8, 8)
for _ in range(int(sys.argv[2])):
    for batch in (1, 8):
        rate = batch * (made - 1) / (run(batch, made) - run(batch, 1))
        print("RATE", batch, rate, flush=True)
"""


def rates(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Tokens per second in all, at each number of sequences."""
    done = subprocess.run(
        [str(VLLM), "-c", _CODE, str(folder), str(rounds), str(MADE)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"},
    )
    found: dict[str, list[float]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("RATE"):
            _, batch, rate = line.split()
            found.setdefault(batch, []).append(float(rate))
    assert found, (done.stdout + done.stderr)[-3000:]
    return found


def main() -> None:
    """Pack, run in turns, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["smollm2", "1b"], default="smollm2")
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    times: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dense = dense_model(options.shape, work)
        pack(rounded(dense, "int4", 64), FORMATS["native"], work / "int4")
        pack(open_checkpoint(work / "int4"), FORMATS["gptq"], work / "gptq")
        pack(rounded(dense, "seq2", 64), FORMATS["native"], work / "seq2")
        sides = {
            "vLLM's own kernel, int4": work / "gptq",
            "plugin, int4": work / "int4",
            "plugin, SEQ-2": work / "seq2",
        }
        for _ in range(options.turns):
            for name, path in sides.items():
                for batch, found in rates(path, 5).items():
                    times.setdefault(name, {}).setdefault(batch, []).extend(found)
    result: dict[str, Any] = {
        name: {
            batch: {
                "tokens/s": round(statistics.median(values), 1),
                "quartiles": [round(q, 1) for q in statistics.quantiles(values, n=4)[::2]],
            }
            for batch, values in by_batch.items()
        }
        for name, by_batch in times.items()
    }
    print(json.dumps(result, indent=2))
    record(f"vllm_plugin-{options.shape}", result)


if __name__ == "__main__":
    main()
