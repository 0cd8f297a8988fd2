"""The README's table: what was measured beside the peers, and where they are ahead."""

from docs.figures import load, short, table
from qexport.formats.table import verdict_table

__all__ = ["peers"]


def peers() -> str:
    """A row for what one would ask of each."""
    rows = load("ptq-smollm2.json")["rows"]
    lines = [
        ["proof that the file is the model", "every bit", "", "", ""],
        _on_disk(),
        _step("a step for one sequence, 4 bits, ms", 1),
        _step("a step for 32 sequences, 4 bits, ms", 32),
        _clients(),
        *_accuracy(rows),
        ["on GPUs", "not measured yet", "years of use", "years of use", "years of use"],
        ["families of models", "Llama-like, MoE in part", "hundreds", "hundreds", "dozens"],
    ]
    head = ["SmolLM2-135M, two CPU cores", "qexport", "vLLM 0.32", "llama.cpp", "GPTQModel 7.7"]
    lines = [[cell or "–" for cell in line] for line in lines]
    cpus = [load(name)["machine"]["cpu"] for name in ("serve_load.json", "ptq-smollm2.json")]
    seconds = [rows[f"{kind} Q4_0"]["seconds"] for kind in ("mixed as", "llama.cpp")]
    note = (
        "The model is SmolLM2-135M-Instruct as a package on PyPI has it: in Q4_1, made dense. "
        f"Steps and clients are of an {cpus[0]}; on an {cpus[1]} the leads at 32 "
        "sequences and under load were smaller, the latter by an older count. "
        "Both are shared, and the report of the steps calls itself noisy: read ratios. vLLM "
        "as it comes computes on one of the two cores and schedules on the other. Mixing took "
        f"{seconds[0]:.0f} s, llama.cpp {seconds[1]:.0f} s and the importance matrix. Conditions "
        "and much more: [docs/figures.md](/docs/figures.md)."
    )
    return f"{table(head, lines)}\n\n{note}"


def _on_disk() -> list[str]:
    gptq = load("demo.json")["pack"]["gptq"]  # of all layers, whose last group may not be whole
    seq2 = next(
        row for row in verdict_table((576, 576)) if (row["grid"], row["group_size"]) == ("seq2", 64)
    )
    bits = {name: f"{cell['bits_per_weight']:.4g}" for name, cell in seq2["formats"].items()}
    return [
        "bits on disk of ParetoQ's 2 bits in groups of 64, exact",
        f"**{bits['native']}**",
        f"{bits['native']} by our plugin; on GPUs {bits['humming']} (humming)",
        f"{bits['gguf']} (Q4_0)",
        f"{gptq['bits_per_weight']:.3g} (3 bits)",
    ]


def _step(what: str, batch: int) -> list[str]:
    cells = {(c["contender"], c["batch"]): c for c in load("latency-smollm2/report.json")["cells"]}

    def median(name: str) -> str:
        value = cells[name, batch]["itl"]["p50"] * 1e3
        return f"{value:.0f}" if value >= 10 else f"{value:.1f}"

    vllm = f"{median('vllm int4')} (our plugin), {median('vllm dense')} (bfloat16)"
    return [what, median("native int4"), vllm, median("llama.cpp gguf"), ""]


def _clients() -> list[str]:
    served = load("serve_load.json")
    rate = {
        name: f"{served[name]['tokens/s']:.0f}"
        for name in ("qexport", "vllm bfloat16", "vllm int4", "llama-server")
    }
    return [
        f"{served['streams']} clients at {served['slots']} slots, 4 bits, tokens/s",
        rate["qexport"],
        f"{rate['vllm bfloat16']} (bfloat16), {rate['vllm int4']} (GPTQ)",
        rate["llama-server"],
        "",
    ]


def _accuracy(rows: dict[str, dict[str, float]]) -> list[list[str]]:
    perplexity = {name: short(row["perplexity"]) for name, row in rows.items()}
    mixed, theirs = (
        f"{rows[name]['perplexity']:.2f}" for name in ("mixed as Q4_0", "llama.cpp Q4_0")
    )
    return [
        [
            f"GPTQ at 3 bits: perplexity (dense {perplexity['dense']})",
            perplexity["int3-g64 gptq"],
            "",
            "",
            perplexity["int3-g64 GPTQModel"],
        ],
        [
            f"mixed to {rows['llama.cpp Q4_0']['bits']:.2f} bits: perplexity",
            mixed,
            "",
            f"{theirs} (Q4_0, imatrix)",
            "",
        ],
    ]
