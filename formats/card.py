"""The model card of a packed folder: what is in it, how exactly, and how to run it."""

import json
from pathlib import Path
from typing import Any

from qexport.checkpoint import Checkpoint
from qexport.experts import expert_of
from qexport.formats.vllm_support import unlike_parts, vllm_support
from qexport.version import __version__

__all__ = ["model_card"]

_RUN = {
    "native": """```
qexport serve .
```
In Python, with qexport installed:
```python
import qexport.hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(".")
```""",
    "gguf": """With llama.cpp:
```
llama-cli -m model.gguf
llama-server -m model.gguf
```
Or `qexport serve .`""",
}
_SERVE = """```
qexport serve .
```"""
_TRANSFORMERS = """In Python, with the loader that transformers asks for ({needs}):
```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(".")
```
Or `qexport serve .`"""
_NEEDS = {
    "gptq": "gptqmodel and optimum",
    "gptq_v2": "gptqmodel and optimum",
    "awq": "gptqmodel and accelerate",
    "compressed-tensors": "compressed-tensors, 0.18 or newer for 3 bits",
    "int-quantized": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
}


def model_card(source: Checkpoint, report: dict[str, Any]) -> str:
    """README.md for a packed folder. `report` is a PackReport as JSON."""
    form = report["format"]
    rows = "\n".join(f"- {phrase}" for phrase in report["held"])
    verification = report["verification"]
    proof = _proof(verification)
    evaluation = _perplexity(source.folder)
    experts = any(map(expert_of, source.modules))
    run = _RUN.get(form, _SERVE)
    if form in _NEEDS:
        run = _TRANSFORMERS.format(needs=_NEEDS[form])
    elif experts and form == "native":
        run = _SERVE  # `qexport.hf` does not load them
    stored = {verdict["stored"] for verdict in report["verdicts"]}
    vllm = vllm_support(form, stored, experts=experts, unlike=unlike_parts(source))
    if vllm.devices:
        run = f"```\nvllm serve .\n```\n\n{run}"
    return f"""---
library_name: {"gguf" if form == "gguf" else "transformers"}
tags:
- qexport
- {form}
---
# {_title(source)}

Packed by qexport {__version__} as `{form}`.

{rows}

{report["total_bytes"]:,} bytes, of which {report["quantized_bytes"]:,} are quantized matrices
({report["bits_per_weight"]:.4g} bits per weight).{evaluation}

{proof} `qexport verify RUN .` counts again.

## How to run it

{vllm.sentence}

{run}
"""


def _proof(counts: dict[str, Any]) -> str:
    rounded = counts["differing_dense"]
    if counts["exact"]:
        return f"Exact: 0 differing codes and 0 differing bits in {counts['weights']:,} weights."
    if rounded and not counts["differing_bits"]:
        return (
            f"The quantized matrices are exact; {' and '.join(rounded)} were rounded on request, "
            f"by at most {counts['largest_dense_error']:.3g}."
        )
    return (
        f"Not exact: the largest error is {counts['largest_error']:.3g}, "
        f"{counts['largest_ulp']:.2g} float16 ulp of what its group can reach."
    )


def _title(source: Checkpoint) -> str:
    name = source.config.get("_name_or_path") or source.config.get("_model_name_or_path")
    return str(name or source.config.get("model_type") or "model").splitlines()[0][:200]


def _perplexity(folder: Path) -> str:
    """What the run's own evaluation said, where it is there."""
    try:
        results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        value = float(results["eval_perplexity"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"\nPerplexity on the run's held-out text: {value:.4g}."
