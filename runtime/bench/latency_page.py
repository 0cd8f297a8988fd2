"""What people see of a latency benchmark: tables and charts of its JSON."""

from collections.abc import Callable
from typing import Any

from qexport.page import Page, Table
from qexport.runtime.bench.latency import step_seconds
from qexport.runtime.bench.report import machine_facts
from qexport.svg import line_chart

__all__ = ["latency_page"]

_NOTES = [
    "For a request of n tokens that came t1..tn after it was sent: TTFT = t1, ITL = the gaps, "
    "TPOT = (tn − t1) / (n − 1), E2E = tn. All requests of a batch are sent at once. Tokens/s is "
    "of all of them together, by the last token; per user it is 1 / TPOT.",
    "GB/s: weights, scales, head and the batch's keys and values that a step has to read once, "
    "over the median ITL, which is a step of the whole batch (TPOT has others' prompts in it, "
    "that run beside a sequence's first tokens). Transformers and the reference kernel multiply "
    "dense weights, of two or four bytes. Keys and values are counted with two bytes a number.",
    "Engines run in processes of their own and are asked there; llama.cpp by its server over HTTP, "
    "whose reading and parsing shares the machine's cores with it.",
    "Same answers: share of greedy answers equal, token for token, to the first contender's. "
    "Engines that round otherwise part ways in time; random prompts make that early.",
]
_HEADINGS = (
    *("contender", "batch", "prompt", "output"),
    *("TTFT p50 ms", "TTFT p90", "TTFT p99", "TPOT p50 ms", "TPOT p90", "TPOT p99"),
    *("ITL p50 ms", "ITL p99", "E2E p50 ms", "E2E p99"),
    *("tokens/s", "per user", "GB/s", "same answers"),
)


def latency_page(result: dict[str, Any]) -> Page:
    """The page of what `measure_latency` gives."""
    settings = result["settings"]
    facts = {
        **machine_facts(result["machine"]),
        "threads": str(settings["threads"] or "each engine's default"),
        "repeats": f"{settings['repeats']} after {settings['warmups']} to warm up; contenders "
        "in turns",
        "roofs": f"{result['roofs']['bytes_per_second'] / 1e9:.1f} GB/s read; "
        + ", ".join(f"{rate / 1e9:.0f} G/s by {name}" for name, rate in _rates(result).items()),
    }
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        groups.setdefault((cell["prompt"], cell["output"]), []).append(cell)
    charts = [chart for sizes, cells in groups.items() for chart in _charts(result, sizes, cells)]
    tables = [_cells(result), _contenders(result), _crossovers(result)]
    notes = [*_NOTES, *_failures(result)]
    return Page("Latency", facts, result["noise"]["reasons"], tables, charts, notes)


def _cells(result: dict[str, Any]) -> Table:
    rows = []
    for cell in result["cells"]:
        start = [cell["contender"], cell["batch"], cell["prompt"], cell["output"]]
        if "failure" in cell:
            rows.append([*start, *[None] * (len(_HEADINGS) - len(start))])
            continue
        shown = {"ttft": (50, 90, 99), "tpot": (50, 90, 99), "itl": (50, 99), "e2e": (50, 99)}
        times = [_milliseconds(cell[name], p) for name, chosen in shown.items() for p in chosen]
        rates = [cell["tokens_per_second"]["p50"], cell.get("tokens_per_second_per_user")]
        rows.append([*start, *times, *rates, cell.get("achieved_gbps"), cell["same_answers"]])
    return Table("Latency and throughput", _HEADINGS, rows)


def _milliseconds(times: dict[str, float], percentile: int) -> float | None:
    found = times.get(f"p{percentile}")
    return None if found is None else found * 1e3


def _contenders(result: dict[str, Any]) -> Table:
    rows = [
        [
            *(one["name"], one["backend"], one["version"], one["kernel"], one["layout"]),
            *("; ".join(one["schemes"]) or "dense", one["bits_per_weight"]),
            *(one["stored_bytes"] / 2**20, one["peak_memory_bytes"] / 2**20 or None),
            *(one["peak_device_bytes"] / 2**20 or None, one["load_seconds"], one["fingerprint"]),
        ]
        for one in result["contenders"]
    ]
    headings = (
        *("contender", "backend", "version", "kernel", "layout", "schemes", "bits a weight"),
        *("stored MiB", "peak memory MiB", "peak GPU MiB", "load s", "fingerprint"),
    )
    return Table("Contenders", headings, rows)


def _crossovers(result: dict[str, Any]) -> Table:
    rows = [
        [one["contender"], one["against"], one["prompt"], one["output"], one["batch"] or "none"]
        for one in result["crossovers"]
    ]
    title = "Batch from which on the first contender takes nine tenths of another's step or more"
    return Table(title, ("contender", "against", "prompt", "output", "batch"), rows)


def _failures(result: dict[str, Any]) -> list[str]:
    return [
        f"At batch {cell['batch']}, prompts of {cell['prompt']}: {cell['failure']}"
        for cell in result["cells"]
        if "failure" in cell
    ]


def _charts(
    result: dict[str, Any], sizes: tuple[int, int], cells: list[dict[str, Any]]
) -> list[str]:
    """Latency by batch, throughput by latency, speed beside the first contender's, roofline."""
    timed = [cell for cell in cells if step_seconds(cell)]
    if not timed:
        return []
    what = f"prompts of {sizes[0]}, {sizes[1]} tokens"

    def lines(
        x: Callable[[dict[str, Any]], float], y: Callable[[dict[str, Any]], float]
    ) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for cell in timed:
            found.setdefault(cell["contender"], []).append((x(cell), y(cell)))
        return found

    def batch(cell: dict[str, Any]) -> float:
        return float(cell["batch"])

    def step(cell: dict[str, Any]) -> float:
        return float(cell["itl"]["p50"]) * 1e3

    charts = [
        line_chart(f"Latency: {what}", "sequences at a time", "ms a step", lines(batch, step)),
        line_chart(
            f"Throughput against latency: {what}",
            "TPOT, ms",
            "tokens per second in all",
            lines(
                lambda cell: float(cell["tpot"]["p50"]) * 1e3,
                lambda cell: float(cell["tokens_per_second"]["p50"]),
            ),
        ),
    ]
    first = result["contenders"][0]["name"]
    speeds = _speeds(lines(batch, step), first)
    if speeds:
        even = [(x, 1.0) for x, _ in next(iter(speeds.values()))]
        charts.append(
            line_chart(
                f"Where {first} pays: {what}",
                "sequences at a time",
                "times faster than",
                {**speeds, "equally fast": even},
                dashed={"equally fast"},
                order=[one["name"] for one in result["contenders"]],
            )
        )
    return [*charts, _roofline(result, what, timed)]


def _speeds(
    steps: dict[str, list[tuple[float, float]]], first: str
) -> dict[str, list[tuple[float, float]]]:
    """How much faster the first one's steps are than each other's."""
    ours = dict(steps.get(first, []))
    others = {name: line for name, line in steps.items() if name != first}
    found = {
        name: [(x, y / ours[x]) for x, y in line if x in ours] for name, line in others.items()
    }
    return {name: line for name, line in found.items() if line}


def _rates(result: dict[str, Any]) -> dict[str, float]:
    """Operations a second that this machine reached: by what, and how many."""
    roofs = result["roofs"]
    dense = "torch in bfloat16" if result["machine"]["gpu"] else "torch in float32"
    found = {dense: roofs["operations_per_second"]}
    if roofs["int8_operations_per_second"]:
        found["our kernel in int8"] = roofs["int8_operations_per_second"]
    return found


def _roofline(result: dict[str, Any], what: str, cells: list[dict[str, Any]]) -> str:
    operations = {one["name"]: one["operations_per_token"] for one in result["contenders"]}
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        done = operations[cell["contender"]] * cell["batch"]
        point = (done / cell["step_bytes"], done / cell["itl"]["p50"] / 1e9)
        lines.setdefault(cell["contender"], []).append(point)
    read, rates = result["roofs"]["bytes_per_second"], _rates(result)
    ends = [x for line in lines.values() for x, _ in line]
    for name, rate in rates.items():
        corner = rate / read
        inside = [corner] if min(ends) < corner < max(ends) else []
        places = sorted({min(ends), *inside, max(ends)})
        lines[f"roof: {name}"] = [(x, min(x * read, rate) / 1e9) for x in places]
    return line_chart(
        f"Roofline: {what}",
        "operations for each byte",
        "G operations/s",
        lines,
        dashed={f"roof: {name}" for name in rates},
    )
