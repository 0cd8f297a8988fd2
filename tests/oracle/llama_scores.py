"""Run inside the oracle environment: tokens and logits from a real llama.cpp.

usage: llama_scores.py MODEL.gguf JOB.json OUT   (writes OUT.json and OUT.npz)

JOB is {"texts": [...], "ids": [[...]]}: texts to tokenize, and token ids to score.
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main() -> None:
    """Tokenize every text and write the logits at every position of every list of ids."""
    path, job, out = sys.argv[1:]
    work = json.loads(Path(job).read_text())
    model = Llama(path, logits_all=True, n_ctx=256, verbose=False)
    tokens = [model.tokenize(text.encode(), add_bos=False, special=True) for text in work["texts"]]
    logits = []
    for ids in work["ids"]:
        model.reset()
        model.eval(ids)
        logits.append(np.array(model.scores[: len(ids)], dtype=np.float32))
    Path(f"{out}.json").write_text(json.dumps(tokens))
    np.savez(f"{out}.npz", *logits)


if __name__ == "__main__":
    main()
