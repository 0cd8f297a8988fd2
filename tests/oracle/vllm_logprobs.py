"""Run inside the oracle environment: a real vLLM on CPU scores and continues prompts.

usage: vllm_logprobs.py CHECKPOINT PROMPTS.json OUT.json TOKENS DTYPE
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """For every prompt (a list of token ids) its log-probabilities, and greedy tokens after it."""
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM is imported once, not three times
    from vllm import LLM, SamplingParams

    checkpoint, prompts, out, count, dtype = sys.argv[1:]
    model = LLM(checkpoint, dtype=dtype, enforce_eager=True, max_model_len=256)
    inputs = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    sampling = SamplingParams(
        max_tokens=int(count), prompt_logprobs=0, temperature=0.0, ignore_eos=True
    )
    answers = model.generate(inputs, sampling)
    found = {
        "scores": [
            [next(iter(at.values())).logprob for at in answer.prompt_logprobs[1:]]
            for answer in answers
        ],
        "greedy": [list(answer.outputs[0].token_ids) for answer in answers],
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
