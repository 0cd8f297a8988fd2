"""Our generator on a GPU: a random model of Llama-3-8B's shape, batches of 1 to 64.

`python -m benchmarks.gpu_decode` decodes 128 tokens after a prompt of 256 with SEQ-2, int3 and int4
weights in groups of 128, and with bfloat16 ones. `of roofline` is the least time in which a copy on
the same device moves the weights (packed, scales and head included) and the keys and values, over
the time of a step.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ROOT, copy_bandwidth
from qexport.grid import INT3, INT4, SEQ2, Grid, Scheme
from qexport.runtime.cuda_model import BATCHES, CudaDecoder
from qexport.runtime.device_sampler import Draw
from qexport.runtime.families import DecoderConfig, decoder_config
from qexport.runtime.model import Span
from qexport.runtime.random_model import random_model

GRIDS: dict[str, Grid | None] = {"SEQ-2": SEQ2, "int3": INT3, "int4": INT4, "bfloat16": None}
PROMPT, MADE = 256, 128
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


def step_bytes(config: DecoderConfig, grid: Grid | None, batch: int) -> float:
    """That a step reads: each layer's weights once, the head, and keys and values of each row."""
    queries = config.heads * config.head_dim
    rows = queries * 2 + 2 * config.kv_heads * config.head_dim
    weights = config.layers * config.hidden * (rows + 3 * config.inter)
    width = 16.0 if grid is None else grid.bits + 16 / 128
    head = config.vocabulary * config.hidden * 2
    keys = 4 * config.layers * config.kv_heads * config.head_dim * (PROMPT + MADE / 2)
    return weights * width / 8 + head + batch * keys


def measure(decoder: CudaDecoder, batch: int) -> list[float]:
    """Seconds of each step of a batch, after its prompts."""
    for slot in range(batch):
        decoder.forward([Span(slot, 0, list(range(1, PROMPT + 1)), PROMPT, logits=False)])
    tokens, times = [1] * batch, []
    draws = [Draw()] * batch
    for made in range(MADE + 8):
        at = PROMPT + made
        spans = [Span(slot, at, [token], at + 1) for slot, token in enumerate(tokens)]
        begin = time.perf_counter()
        tokens = decoder.choose(spans, draws)
        assert min(tokens) >= 0, "logits are NaN"
        times.append(time.perf_counter() - begin)
    return times[8:]


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    config = decoder_config(LLAMA)
    assert isinstance(config, DecoderConfig)
    device = torch.device("cuda", torch.cuda.current_device())
    bandwidth = copy_bandwidth()
    table: dict[str, Any] = {}
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    path = options.output or ROOT / "benchmarks" / "results" / name / "decode.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for label, grid in GRIDS.items():
        decoder = CudaDecoder(
            random_model(LLAMA, config, None if grid is None else Scheme(grid, 128)),
            config,
            slots=BATCHES[-1],
            context=PROMPT + MADE + 8,
            device=device,
            dtype=torch.bfloat16,
        )
        rows = table[f"{label}, {decoder.kernels or 'cuBLAS'}"] = {}
        for batch in BATCHES:
            times = measure(decoder, batch)
            middle = statistics.median(times)
            least = step_bytes(config, grid, batch) / bandwidth / 1e9
            rows[batch] = {
                "ms/step": round(middle * 1000, 3),
                "tokens/s": round(batch / middle, 1),
                "of roofline": round(least / middle, 3),
            }
            print(label, batch, rows[batch], flush=True)
        result = {"copy GB/s": round(bandwidth, 1), "torch": torch.__version__, "table": table}
        path.write_text(json.dumps(result, indent=1) + "\n")
        del decoder
        gc.collect()  # steps and their decoder know each other
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
