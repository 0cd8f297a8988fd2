"""Run inside the oracle environment: greedy tokens of a real vLLM on CPU.

usage: vllm_tokens.py CHECKPOINT PROMPTS.json OUT.json [ENGINE OPTIONS AS JSON]
"""

import json
import os
import sys
from pathlib import Path

TOKENS = 32


def main() -> None:
    """For every prompt (a list of token ids) the tokens after it."""
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1")
    from vllm import LLM, SamplingParams

    checkpoint, prompts, out, *options = sys.argv[1:]
    chosen = json.loads(options[0]) if options else {}
    if chosen.get("tensor_parallel_size", 1) > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # else each rank wants a NUMA node
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM is imported once, not three times
    model = LLM(checkpoint, **{"dtype": "float32", "max_model_len": 256, **chosen})
    inputs = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    answers = model.generate(inputs, sampling)
    Path(out).write_text(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))


if __name__ == "__main__":
    main()
