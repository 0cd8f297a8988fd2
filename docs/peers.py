"""The README's table: what was measured beside the peers, and where they are ahead."""

from docs.figures import load, short, table

__all__ = ["peers"]


def peers() -> str:
    """A row for what one would ask of each."""
    served = load("serve_load.json")
    rows = load("ptq-smollm2.json")["rows"]
    cells = {(c["contender"], c["batch"]): c for c in load("latency-smollm2/report.json")["cells"]}

    def step(name: str, batch: int) -> str:
        return f"{cells[name, batch]['itl']['p50'] * 1e3:.2g}"

    def quantized(name: str) -> str:
        return short(rows[name]["perplexity"])

    lines = [
        ["proof that the file is the model", "every bit", "", "", ""],
        [
            "bits on disk of ParetoQ's 2-bit grid, exact",
            "**2.25**",
            "2.25 by our plugin; humming on GPUs",
            "4.5 (Q4_0)",
            "",
        ],
        [
            "a step for one sequence, 4 bits, ms",
            step("native int4", 1),
            f"{step('vllm int4', 1)} (our plugin)",
            step("llama.cpp gguf", 1),
            "",
        ],
        [
            "a step for 32 sequences, ms",
            step("native int4", 32),
            f"{step('vllm dense', 32)} (bfloat16)",
            step("llama.cpp gguf", 32),
            "",
        ],
        [
            "64 streams at a time, tokens/s",
            f"{served['qexport']['tokens/s']:.0f}",
            f"{served['vllm bfloat16']['tokens/s']:.0f} (bfloat16)",
            f"{served['llama-server']['tokens/s']:.0f}",
            "",
        ],
        [
            f"GPTQ at 3 bits: perplexity (dense {quantized('dense')})",
            quantized("int3-g64 gptq"),
            "",
            "",
            quantized("int3-g64 GPTQModel"),
        ],
        [
            f"mixed to {rows['llama.cpp Q4_0']['bits']:.2f} bits: perplexity",
            f"{rows['mixed as Q4_0']['perplexity']:.2f}",
            "",
            f"{rows['llama.cpp Q4_0']['perplexity']:.2f} (Q4_0, imatrix)",
            "",
        ],
        ["on GPUs", "not measured yet", "years of use", "years of use", "years of use"],
        ["model families", "Llama-like, MoE in part", "hundreds", "hundreds", "dozens"],
    ]
    head = ["SmolLM2-135M, two CPU cores", "qexport", "vLLM 0.32", "llama.cpp", "GPTQModel 7.7"]
    lines = [[cell or "–" for cell in line] for line in lines]
    return f"{table(head, lines)}\n\nHow, and much more: [docs/figures.md](/docs/figures.md)."
