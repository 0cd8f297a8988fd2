"""Tables of what was measured, from the JSON that was committed with it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["FIGURES", "load", "short", "table"]

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"
_MACHINE = "amd-epyc-2-cores"
_XEON = "intel-r-xeon-r-processor-2-cores"
_ELSEWHERE = {"serve_load.json": _XEON, "latency-smollm2/report.json": _XEON}  # measured anew


def accuracy() -> str:
    """Perplexity after training, beside rounding and dense fine-tuning."""
    found = load("accuracy-smollm2.json")
    rows, tuned = found["rows"], found["rows"]["fine-tuned"]["builtin"]
    lines = []
    for bits in ("4", "3", "2", "1.58", "1"):
        rounded, trained = rows[f"{bits} RTN"], rows[f"{bits} QAT"]
        lines.append(
            [
                f"{bits} bit{'s' if bits != '1' else ''}",
                short(rounded["builtin"]),
                short(trained["builtin"]),
                f"{trained['builtin'] / tuned:.2f}",
                short(trained["generated"]),
                f"{trained['generated'] / rows['fine-tuned']['generated']:.2f}",
                f"{trained['minutes']:.0f}",
            ]
        )
    head = ["", "rounded (RTN)", "trained", "of fine-tuned", "own text", "of fine-tuned", "minutes"]
    note = (
        f"Dense as it comes {rows['dense']['builtin']:.1f}, dense fine-tuned on the same tokens "
        f"{tuned:.1f}; on text of the model's own {rows['dense']['generated']:.1f} and "
        f"{rows['fine-tuned']['generated']:.1f}. Groups of {found['group_size']}, "
        f"{rows['2 QAT']['steps']} steps of 2,048 tokens. At 2 bits the same end to end alone, by "
        f"{rows['2 end to end']['steps']} steps in place of the start: "
        f"{rows['2 end to end']['builtin']:.1f}. The minutes at 1.58 bits are of a run that had "
        "13 of 30 blocks from an earlier start."
    )
    return _with(
        table(head, lines), note, found, "accuracy-smollm2.json", "python -m benchmarks.accuracy"
    )


def ptq() -> str:
    """Perplexity after quantization without training, beside GPTQModel and llama.cpp."""
    found = load("ptq-smollm2.json")
    rows = found["rows"]
    names = {"int4-g64": "4 bits", "int3-g64": "3 bits", "uint2-g64": "2 bits, zero points"}
    methods = {
        **{"rtn": "RTN", "awq": "AWQ", "gptq": "GPTQ", "signround": "SignRound"},
        "GPTQModel": "GPTQModel 7.7",
    }
    lines = [
        [said, *(_cell(rows.get(f"{scheme} {method}")) for method in methods)]
        for scheme, said in names.items()
    ]
    first = table(["groups of 64", *methods.values()], lines)
    others = [
        [
            kind,
            f"{rows[name]['bits']:.2f}",
            _cell(rows[name]),
            _cell(rows.get(f"mixed as {kind}")),
            _of(rows.get(f"kquant {kind[:4]}")),
        ]
        for name in rows
        if (kind := name.removeprefix("llama.cpp ")) != name and kind != "Q3_K_S"
    ]
    head = ["", "bits", "llama.cpp, imatrix", "ours, mixed to as many", "ours, `kquant`"]
    note = (
        f"Perplexity of the same held-out text (dense {rows['dense']['perplexity']:.1f}), after "
        "quantization by the same 64 windows of 512 tokens; in brackets seconds, where the run had "
        "the cores to itself. 256 does not divide 576 inputs, so that llama.cpp's Q2_K and Q3_K_S "
        "are the same file, IQ4_NL in most layers, as ours is. RTN differs a little from the table "
        "above, whose scales are the start of training."
    )
    return _with(
        f"{first}\n\n{table(head, others)}",
        note,
        found,
        "ptq-smollm2.json",
        "python -m benchmarks.ptq",
    )


def decode() -> str:
    """Tokens per second of two models beside llama.cpp."""
    small, large = load("decode-smollm2.json"), load("decode-1b.json")
    names = {
        "qexport seq2, int4 head": "qexport SEQ-2, int4 head",
        "qexport int3, int4 head": "qexport int3, int4 head",
        "qexport int4, int4 head": "qexport int4, int4 head",
        "llama.cpp Q4_0, embedding too": "llama.cpp Q4_0, embedding and head too",
        "qexport seq2": "qexport SEQ-2, bfloat16 head",
        "qexport int4": "qexport int4, bfloat16 head",
        "llama.cpp Q4_0, the same codes": "llama.cpp Q4_0, the same codes, bfloat16 head",
        "vLLM CPU bfloat16": "vLLM CPU, bfloat16",
        "transformers bfloat16": "transformers, bfloat16",
    }
    kinds = ("prompt", "decode", "decode, batch 8")
    lines = []
    for name, said in names.items():
        cells = []
        for found in (small, large):
            row: dict[str, Any] = next((r for r in found["rows"] if r["engine"] == name), {})
            cells += [f"{row[kind]['median']:,.0f}" if kind in row else "" for kind in kinds]
        if any(cells):
            lines.append([said, *cells])
    head = ["tokens/s", "SmolLM2: prompt", "decoding", "8 at a time"]
    note = (
        "Prompts of 512 tokens; groups of 64; a random model of Llama-3.2-1B's shape on the right. "
        "The head as it is trained, in bfloat16, or rounded by `--head-bits 4`."
    )
    return _with(
        table([*head, "1B: prompt", "decoding", "8 at a time"], lines),
        note,
        small,
        "decode-smollm2.json",
        "python -m benchmarks.decode",
    )


def latency() -> str:
    """What a user measures: steps and throughput by batch, all engines on the same tokens."""
    found = load("latency-smollm2/report.json")
    other = json.loads((ROOT / RESULTS / _MACHINE / "latency-smollm2/report.json").read_text())
    cells, before = (
        {(cell["contender"], cell["batch"]): cell for cell in report["cells"]}
        for report in (found, other)
    )
    lines = []
    for name, said in _CONTENDERS.items():
        line = [said]
        for batch in (1, 8, 32):
            cell = cells[name, batch]
            step, rate = cell["itl"]["p50"] * 1e3, cell["tokens_per_second"]["p50"]
            line += [f"{step:.0f} ms" if step >= 10 else f"{step:.1f} ms", f"{rate:.0f}"]
        lines.append(line)
    head = ["", "one: step", "tokens/s", "eight: step", "tokens/s", "32: step", "tokens/s"]
    pairs = [[before[name, n]["itl"]["p50"] * 1e3 for n in (1, 32)] for name in _CONTENDERS]
    steps = ", ".join(f"{one:.1f} and {many:.0f}" for one, many in pairs)
    reasons = "; ".join(found["noise"]["reasons"])
    note = (
        "SmolLM2, prompts of 128 tokens and 32 more, all sent at once. A step is the median gap "
        "between tokens; tokens/s are the whole batch's, prompts included."
        + (f" The report calls itself noisy ({reasons}): read ratios." if reasons else "")
        + f" On an {other['machine']['cpu']} the steps for one and for 32 were {steps} ms, in the "
        "order of the table."
    )
    return _with(
        table(head, lines), note, found, "latency-smollm2/report.json", "qexport bench latency"
    )


_CONTENDERS = {
    "native seq2": "qexport SEQ-2",
    "native int4": "qexport int4",
    "native dense": "qexport, bfloat16 weights",
    "llama.cpp gguf": "llama.cpp, Q4_0, the same codes",
    "vllm int4": "vLLM, int4 by our plugin",
    "vllm dense": "vLLM, bfloat16",
    "transformers dense": "transformers, bfloat16",
}


def load_test() -> str:
    """64 streams at a time: throughput and latency of four servers."""
    found = load("serve_load.json")
    other = json.loads((ROOT / RESULTS / _MACHINE / "serve_load.json").read_text())
    names = {
        "qexport": "qexport, int4 g32",
        "vllm bfloat16": "vLLM CPU, bfloat16",
        "llama-server": "llama-server, Q4_0, the same codes",
        "vllm int4": "vLLM CPU, GPTQ, the same codes",
    }
    lines = [
        [
            said,
            f"{row['tokens/s']:.0f}",
            f"{row['TTFT s']['p50']:.1f} / {row['TTFT s']['p99']:.1f} s",
            f"{row['TPOT s']['p50'] * 1e3:.0f} / {row['TPOT s']['p99'] * 1e3:.0f} ms",
            f"{row['lost']} / {row['differing']}",
        ]
        for name, said in names.items()
        if (row := found[name])
    ]
    head = ["", "tokens/s", "TTFT p50 / p99", "TPOT p50 / p99", "lost / differing answers"]
    begin, end = found["qexport"]["memory MiB"][0], found["qexport"]["memory MiB"][-1]
    note = (
        f"{found['streams']} streams at a time for {found['seconds'] / 60:.0f} minutes at "
        f"{found['slots']} slots, prompts of 5 to 300 words, a tenth of the clients leaving in the "
        "middle and one request in fifty malformed, one server after the other. Memory of ours "
        f"went from {begin:,} to {end:,} MiB over the last two minutes. vLLM as it comes: of two "
        "cores its worker computes on one, and the other is its server's and scheduler's. "
        f"The lead depends on machine and count: on an {other['machine']['cpu']}, by an older "
        "count that took pieces of text for tokens and had prefixes of ours alone warm, these were "
        + ", ".join(f"{other[name]['tokens/s']:.0f}" for name in names)
        + " tokens/s, in the order of the table."
    )
    return _with(
        table(head, lines), note, found, "serve_load.json", "python -m benchmarks.serve_load"
    )


def kernels() -> str:
    """One token through a matrix of 4096 x 4096."""
    cold, hot = load("cpu_kernels-cold-m1.json"), load("cpu_kernels-hot-m1.json")
    names = {
        **{"seq2": "qexport SEQ-2", "int3": "qexport int3", "int4": "qexport int4"},
        "onnxruntime W2": "onnxruntime MatMulNBits, 2 bits",
        "onnxruntime W4": "onnxruntime MatMulNBits, 4 bits",
        "torch int4": "torch int4",
        "torch bfloat16": "torch bfloat16",
    }

    def times(found: Any, name: str) -> str:
        by = {row["group"]: row["microseconds"] for row in found["rows"] if row["kernel"] == name}
        return f"{by[64]:.0f} / {by[128]:.0f}"

    lines = [[said, times(cold, name), times(hot, name)] for name, said in names.items()]
    note = "Microseconds with two threads, in groups of 64 / 128."
    return _with(
        table(["", "weights from memory", "in the caches"], lines),
        note,
        cold,
        "cpu_kernels-cold-m1.json",
        "python -m benchmarks.cpu_kernels",
    )


def plugin() -> str:
    """vLLM's CPU build with our plugin, and with its own 4-bit kernel."""
    found = load("vllm_plugin-smollm2.json")
    own = found["vLLM's own kernel, int4"]
    lines = [
        [
            name,
            *(f"{found[name][batch]['tokens/s']:.0f}" for batch in ("1", "8")),
            " / ".join(
                f"{found[name][batch]['tokens/s'] / own[batch]['tokens/s']:.1f}"
                for batch in ("1", "8")
            ),
        ]
        for name in ("plugin, SEQ-2", "plugin, int4", "vLLM's own kernel, int4")
    ]
    return _with(
        table(["tokens/s in vLLM", "one sequence", "eight", "times its own"], lines),
        "SmolLM2, decoding.",
        found,
        "vllm_plugin-smollm2.json",
        "python -m benchmarks.vllm_plugin",
    )


def fake_quant() -> str:
    """What fake quantization adds to a training step."""
    found = load("fake_quant.json")
    widths = sorted({row["bits"] for row in found["rows"]}, key=float, reverse=True)
    by = {(row["bits"], row["tokens"]): row for row in found["rows"]}
    lines = [
        [f"{bits} bits", *(f"{by[bits, count]['fused_ratio']:.2f}" for count in (512, 2048))]
        for bits in widths
    ]
    note = (
        "Times a plain fine-tuning step of the same model and tokens takes: a whole step with fake "
        "quantization (compiled), medians of turns. Plain steps of 2,048 tokens differ by a tenth "
        "among themselves, which is more than what is looked for: values below 1 are noise."
    )
    return _with(
        table(["", "512 tokens a step", "2,048 tokens a step"], lines),
        note,
        found,
        "fake_quant.json",
        "python -m benchmarks.fake_quant",
    )


def packing() -> str:
    """How fast a large model packs, every tensor read back and compared."""
    found = load("pack.json")
    lines = [
        [
            row["format"],
            f"{sorted(row['seconds'])[len(row['seconds']) // 2]:.0f} s",
            f"{row['of_copy']:.2f}",
            f"{row['peak_bytes'] / 1e9:.1f} GB",
            "exact" if row["exact"] else "NOT exact",
        ]
        for row in found["rows"]
    ]
    note = (
        f"A model of Llama-3-8B's shapes ({found['source_bytes'] / 1e9:.1f} GB: 4-bit layers, "
        "dense embedding and head). The speed is beside `cp` to the same disk, its source in "
        "memory; a first `cp` is slower."
    )
    return _with(
        table(["", "time", "of `cp`'s speed", "peak memory", "read back"], lines),
        note,
        found,
        "pack.json",
        "python benchmarks/pack.py",
    )


def demo() -> str:
    """What `make demo` comes to."""
    found = load("demo.json")
    native, gptq = found["pack"]["native"], found["pack"]["gptq"]
    proof = native["verification"]
    perplexity = {name: row["perplexity"] for name, row in found["perplexity"].items()}
    lines = [
        [
            f"{name} file",
            f"{size['total_bytes'] / 1e6:.0f} MB, {size['bits_per_weight']:.2f} bits per "
            "quantized weight; embeddings stay bfloat16",
        ]
        for name, size in (("native", native), ("GPTQ", gptq))
    ]
    lines.append(
        [
            "verified",
            f"{proof['differing_codes']} differing codes and {proof['differing_bits']} "
            f"differing bits of {proof['weights']:,} weights",
        ]
    )
    lines.append(
        [
            "perplexity",
            f"dense {perplexity['dense']:.1f}; rounded to 2 bits "
            f"{short(perplexity['before training'])}; trained {perplexity['after training']:.1f}",
        ]
    )
    note = (
        f"SmolLM2-135M-Instruct, 2 bits, groups of {found['settings']['--group-size']}, "
        f"{found['training']['tokens']:,} tokens. Perplexity in windows of 512 (tables above: 256) "
        "and rounded by scales of least squares. A demonstration, and no good model: ParetoQ "
        "takes 30 billion tokens."
    )
    return _with(table(["", ""], lines), note, found, "demo.json", "make demo")


def _of(row: dict[str, float] | None) -> str:
    """Perplexity, and the bits that it took."""
    return "" if row is None else f"{short(row['perplexity'])} at {row['bits']:.2f} bits"


def _cell(row: dict[str, float] | None) -> str:
    """Perplexity, and seconds where they are known."""
    if row is None:
        return "not run"
    seconds = f" ({row['seconds']:.0f} s)" if "seconds" in row else ""
    return f"{short(row['perplexity'])}{seconds}"


def short(value: float) -> str:
    """Of a perplexity."""
    if value >= 1e6:
        return f"{value / 1e6:.1f} million"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def load(name: str) -> Any:
    """What was measured."""
    return json.loads((ROOT / _path(name)).read_text())


def _path(name: str) -> str:
    return f"{RESULTS}/{_ELSEWHERE.get(name, _MACHINE)}/{name}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    columns = list(head)
    lines = [columns, *map(list, rows)]
    written = ["| " + " | ".join(line) + " |" for line in lines]
    written.insert(1, "|" + "-|" * len(columns))
    return "\n".join(written)


def _with(text: str, note: str, found: dict[str, Any], name: str, command: str) -> str:
    """The table, what it means, and where it was measured by what."""
    machine = found["machine"]
    return (
        f"{text}\n\n{note}\n\n*Measured on {machine['cores']} cores of an {machine['cpu']}, torch "
        f"{machine['packages']['torch']}, by `{command}`: [{name}](/{_path(name)}).*"
    )


FIGURES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(accuracy, ptq, decode, latency, load_test, kernels, plugin, fake_quant, packing, demo),
    )
}
