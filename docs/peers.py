"""The README's table: what was measured beside the peers, and where they are ahead."""

from docs.figures import load, short, table
from qexport.formats.table import verdict_table

__all__ = ["peers"]


def peers() -> str:
    """A row for what one would ask of each."""
    served = load("serve_load.json")
    rows = load("ptq-smollm2.json")["rows"]
    gptq = load("demo.json")["pack"]["gptq"]  # of all layers, whose last group may not be whole
    cells = {(c["contender"], c["batch"]): c for c in load("latency-smollm2/report.json")["cells"]}

    seq2 = next(
        row for row in verdict_table((576, 576)) if (row["grid"], row["group_size"]) == ("seq2", 64)
    )
    on_disk = {name: f"{cell['bits_per_weight']:.4g}" for name, cell in seq2["formats"].items()}

    def step(name: str, batch: int) -> str:
        value = cells[name, batch]["itl"]["p50"] * 1e3
        return f"{value:.0f}" if value >= 10 else f"{value:.1f}"

    def quantized(name: str) -> str:
        return short(rows[name]["perplexity"])

    lines = [
        ["proof that the file is the model", "every bit", "", "", ""],
        [
            "bits on disk of ParetoQ's 2 bits in groups of 64, exact",
            f"**{on_disk['native']}**",
            f"{on_disk['native']} by our plugin; on GPUs {on_disk['humming']} (humming)",
            f"{on_disk['gguf']} (Q4_0)",
            f"{gptq['bits_per_weight']:.3g} (3 bits)",
        ],
        [
            "a step for one sequence, 4 bits, ms",
            step("native int4", 1),
            f"{step('vllm int4', 1)} (our plugin)",
            step("llama.cpp gguf", 1),
            "",
        ],
        [
            "a step for 32 sequences, 4 bits, ms",
            step("native int4", 32),
            f"{step('vllm dense', 32)} (bfloat16)",
            step("llama.cpp gguf", 32),
            "",
        ],
        [
            f"{served['streams']} clients at {served['slots']} slots, 4 bits, tokens/s",
            f"{served['qexport']['tokens/s']:.0f}",
            f"{served['vllm bfloat16']['tokens/s']:.0f} (bfloat16), "
            f"{served['vllm int4']['tokens/s']:.0f} (GPTQ)",
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
        ["families of models", "Llama-like, MoE in part", "hundreds", "hundreds", "dozens"],
    ]
    head = ["SmolLM2-135M, two CPU cores", "qexport", "vLLM 0.32", "llama.cpp", "GPTQModel 7.7"]
    lines = [[cell or "–" for cell in line] for line in lines]
    seconds = [rows[f"{kind} Q4_0"]["seconds"] for kind in ("mixed as", "llama.cpp")]
    note = (
        "The model is SmolLM2-135M-Instruct as a package on PyPI has it: in Q4_1, made dense. "
        "The machine is shared, and the report of the steps calls itself noisy: read ratios. vLLM "
        "as it comes computes on one of the two cores and schedules on the other. Mixing took "
        f"{seconds[0]:.0f} s, llama.cpp {seconds[1]:.0f} s and the importance matrix. Conditions "
        "and much more: [docs/figures.md](/docs/figures.md)."
    )
    return f"{table(head, lines)}\n\n{note}"
