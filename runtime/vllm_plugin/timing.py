"""vLLM's engine as a backend of `qexport bench latency`, in the process that measures it."""

import os
import time
from pathlib import Path

from qexport.runtime.bench.backends import Answers, Backend, Options

__all__ = ["VllmEngine"]


class VllmEngine(Backend):
    """vLLM's engine, step by step, without a server between."""

    def __init__(self, path: Path, options: Options) -> None:
        # one process: in its own worker vLLM leaves a core to processes that there are none of here
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        import torch
        import vllm
        from vllm import LLM

        from qexport.formats import open_checkpoint
        from qexport.runtime.vllm_server import preflight

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        dtype = options.serving.get("dtype", "auto")
        self._engine = LLM(
            str(path),
            dtype=dtype,
            max_model_len=options.context,
            max_num_seqs=options.slots,
            enable_prefix_caching=False,
            disable_log_stats=True,
        ).llm_engine
        self._asked = 0
        packed = open_checkpoint(path).modules
        self.kernel = "; ".join(preflight(path, dtype)) if packed else "vLLM's dense"
        self.version = str(vllm.__version__)

    def run(self, prompts: list[list[int]], tokens: int) -> Answers:
        from vllm import SamplingParams

        wanted = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        start = time.monotonic()
        places = {}
        for index, prompt in enumerate(prompts):
            self._asked += 1
            places[str(self._asked)] = index
            self._engine.add_request(str(self._asked), {"prompt_token_ids": prompt}, wanted)
        found = Answers([[] for _ in prompts], [[] for _ in prompts])
        while self._engine.has_unfinished_requests():
            made = self._engine.step()
            now = time.monotonic() - start
            for output in made:
                index = places[_asked_as(output.request_id)]
                new = list(output.outputs[0].token_ids)[len(found.tokens[index]) :]
                found.tokens[index] += new
                found.times[index] += [now] * len(new)
        return found


def _asked_as(request_id: str) -> str:
    """vLLM may add something of its own behind an id."""
    return request_id.partition("-")[0]
