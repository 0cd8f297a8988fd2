"""What people see of a serving benchmark: a table and charts of its JSON."""

from typing import Any

from qexport.page import Page, Table
from qexport.runtime.bench.report import machine_facts
from qexport.svg import line_chart

__all__ = ["serve_page"]

_HEADINGS = (
    *("level", "requests", "failed", "requests/s", "tokens/s", "good/s", "good"),
    *("TTFT p50 ms", "TTFT p90", "TTFT p99", "TPOT p50 ms", "TPOT p90", "TPOT p99"),
    *("ITL p50 ms", "ITL p99", "E2E p50 ms", "E2E p99"),
)


def serve_page(result: dict[str, Any]) -> Page:
    """The page of what `measure_serving` gives."""
    settings, rows = result["settings"], []
    shown = {"ttft": (50, 90, 99), "tpot": (50, 90, 99), "itl": (50, 99), "e2e": (50, 99)}
    for one in result["levels"]:
        found = [one[name].get(f"p{p}") for name, chosen in shown.items() for p in chosen]
        times = [None if value is None else value * 1e3 for value in found]
        counts = [f"{one['level']:g}", one["whole"], one["failed"], one["requests_per_second"]]
        goods = [one["goodput_per_second"], one["good_share"]]
        rows.append([*counts, one["tokens_per_second"], *goods, *times])
    kind = "requests a second, open loop" if settings["open_loop"] else "clients, closed loop"
    limits = ", ".join(f"{name} {limit:g} ms" for name, limit in settings["goodput"].items())
    facts = {
        **machine_facts(result["machine"]),
        "server": f"{settings['url']}, {settings['model']}",
        "load": f"levels are {kind}; {settings['requests']} requests each, prompts of "
        f"{settings['words']} words, {settings['output']} tokens",
        "good is": limits or "not asked for",
    }
    notes = [
        "TTFT and E2E count from when a request was due, so that a server that falls behind does "
        "not look fast; TPOT = (last − first) / (tokens − 1), by the server's count of tokens, or "
        "by that of events where it sends none; an end without text is no token; "
        "ITL are gaps between events. Good requests keep within all limits, their largest gap "
        "within that of ITL.",
        *(f"At {one['level']:g}: {error}" for one in result["levels"] for error in one["errors"]),
    ]
    table = Table("Load", _HEADINGS, rows)
    charts = _charts(result)
    clean = "the machine was quiet but for the server; nothing is repeated, so run it again"
    return Page("Serving", facts, result["noise"]["reasons"], [table], charts, notes, clean)


def _charts(result: dict[str, Any]) -> list[str]:
    levels = [one for one in result["levels"] if one["tpot"].get("p50") and one["tokens"]]
    if not levels:
        return []
    by_level = {
        f"{name.upper()} {p}": [(one["level"], one[name][p] * 1e3) for one in levels]
        for name in ("ttft", "tpot")
        for p in ("p50", "p99")
    }
    through = [(one["tpot"]["p50"] * 1e3, one["tokens_per_second"]) for one in levels]
    unit = "requests a second" if result["settings"]["open_loop"] else "clients"
    return [
        line_chart("Latency by load", unit, "ms", by_level),
        line_chart(
            "Throughput against latency", "TPOT, ms", "tokens per second", {"server": through}
        ),
    ]
