"""Run inside the oracle environment: log-probabilities of given tokens from a real vLLM on CPU.

usage: vllm_logprobs.py CHECKPOINT PROMPTS.json OUT.json
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Score every prompt (a list of token ids) and write a list of log-probabilities for each."""
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1")
    from vllm import LLM, SamplingParams

    checkpoint, prompts, out = sys.argv[1:]
    model = LLM(checkpoint, dtype="bfloat16", enforce_eager=True, max_model_len=256)
    inputs = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    answers = model.generate(inputs, SamplingParams(max_tokens=1, prompt_logprobs=0))
    scores = [
        [next(iter(at.values())).logprob for at in answer.prompt_logprobs[1:]] for answer in answers
    ]
    Path(out).write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
