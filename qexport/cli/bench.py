"""`qexport bench latency`, `kernels` and `serve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qexport.cli.common import Command, Numbers, json_option, print_json, progress_console
from qexport.cli.serving import engine_options
from qexport.errors import InputError

if TYPE_CHECKING:
    from qexport.page import Page

_COUNT = click.IntRange(1, 10_000)
_output = click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder for report.json, .csv, .md and .html.",
)


_EPILOG = """\b
Examples:
  qexport bench latency packed --peer transformers=dense -o report
  qexport bench kernels --bits 2,4
  qexport bench serve --concurrency 1,8"""


@click.group(epilog=_EPILOG)
def command() -> None:
    """Measure latency of engines side by side, kernels, or a server under load.

    Every report says what it was measured on, keeps all samples, and calls itself noisy where other
    processes took the machine's time or repeats lie far apart.
    """


_LATENCY = """\b
Examples:
  qexport bench latency packed --batch 1,8,32 -o report
  qexport bench latency packed --peer native=dense --peer transformers=dense
  qexport bench latency packed --peer vllm --peer llama.cpp=gguf --threads 8

\b
Peers: native, vllm, llama.cpp and transformers, each with its own folder after =,
or with PATH."""


@command.command(cls=Command, epilog=_LATENCY)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--peer", "peers", multiple=True, metavar="BACKEND[=PATH]", help="See below.")
@click.option("--batch", type=Numbers(), default="1,2,4,8,16,32", show_default=True)
@click.option("--prompt", type=Numbers(), default="128", show_default=True, help="Tokens.")
@click.option("--tokens", type=Numbers(), default="32", show_default=True, help="Generated.")
@click.option("--repeats", default=5, show_default=True, type=_COUNT)
@click.option("--warmups", default=1, show_default=True, type=click.IntRange(0, 100))
@click.option("--seed", default=0, show_default=True, help="Of the prompts' tokens.")
@click.option("--llama-server", help="llama.cpp's server; default the one on the path.")
@click.option("--vllm-python", help="A Python that has vLLM and qexport; default this one.")
@_output
@json_option
@engine_options
def latency(
    path: Path,
    peers: tuple[str, ...],
    batch: tuple[int, ...],
    prompt: tuple[int, ...],
    tokens: tuple[int, ...],
    repeats: int,
    warmups: int,
    seed: int,
    llama_server: str | None,
    vllm_python: str | None,
    folder: Path | None,
    as_json: bool,
    serving: dict[str, Any],
) -> None:
    """TTFT, TPOT, ITL, E2E and throughput of PATH, and of peers on the same tokens."""
    from qexport.runtime.bench.contender import Contender, parse_contender
    from qexport.runtime.bench.latency import Settings, measure_latency
    from qexport.runtime.bench.latency_page import latency_page

    contenders = [Contender("native", path), *(parse_contender(peer, path) for peer in peers)]
    if len({one.name for one in contenders}) < len(contenders):
        raise InputError("two contenders have the same name; give each a folder of its own name.")
    settings = Settings(
        *(batch, prompt, tokens, repeats, warmups, seed),
        threads=serving.pop("threads"),
        serving=serving,
        llama=llama_server,
        python=vllm_python,
    )
    _check(folder)
    result = measure_latency(contenders, settings, _tell)
    _report(result, latency_page(result), folder, as_json)
    failures = {cell["failure"] for cell in result["cells"] if "failure" in cell}
    _end_with(sorted(failures))


_KERNELS = """\b
Examples:
  qexport bench kernels --bits 2,4 --group-size 128 --shape 4096x4096
  qexport bench kernels --bits 2 --group-size 64 --shape 1536x576 --batch 1,8,64 -o report"""


@command.command(cls=Command, epilog=_KERNELS)
@click.option(
    "--bits", default="2,3,4", show_default=True, help="1, 1.58, 2, 3, 4, 5, 6 or 8; several."
)
@click.option("--group-size", default=128, show_default=True, help="-1 is one scale per channel.")
@click.option(
    "--shape", "shapes", multiple=True, default=("4096x4096",), help="OUTxIN; repeatable."
)
@click.option("--batch", type=Numbers(), default="1,8,32", show_default=True, help="Tokens.")
@click.option("--repeats", default=9, show_default=True, type=_COUNT)
@_output
@json_option
def kernels(
    bits: str,
    group_size: int,
    shapes: tuple[str, ...],
    batch: tuple[int, ...],
    repeats: int,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Time every kernel that takes a scheme on this machine, beside torch's dense bfloat16."""
    from qexport.cli.schemes import scheme_of
    from qexport.runtime.bench.kernels import KernelSettings, kernels_page, measure_kernels
    from qexport.runtime.loader import best_device

    sizes = tuple(_shape(text) for text in shapes)
    schemes = tuple(scheme_of(width, group_size) for width in bits.split(","))
    for scheme in schemes:
        for _, inputs in sizes:
            if scheme.group_size and inputs % scheme.group_size:
                raise InputError(f"groups of {group_size} do not divide {inputs} inputs.")
    _check(folder)
    settings = KernelSettings(schemes, sizes, batch, repeats)
    result = measure_kernels(settings, best_device(), _tell)
    _report(result, kernels_page(result), folder, as_json)


_SERVE = """\b
Examples:
  qexport bench serve --concurrency 1,8,32
  qexport bench serve --url https://models.example --api-key KEY --rate 1,2,4 \\
    --goodput ttft:500 --goodput tpot:50 -o report"""


@command.command(cls=Command, epilog=_SERVE)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@click.option("--api-key", "key")
@click.option("--model", help="Default: the first that the server lists.")
@click.option("--concurrency", type=Numbers(), help="Closed loop: clients; several levels.")
@click.option("--rate", type=Numbers(float), help="Open loop: requests a second; several levels.")
@click.option("--burstiness", default=1.0, show_default=True, type=click.FloatRange(0.01, 100))
@click.option("--requests", default=64, show_default=True, type=click.IntRange(1, 1_000_000))
@click.option("--words", default=100, show_default=True, type=_COUNT, help="Of a prompt.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(2, 1 << 20))
@click.option("--goodput", multiple=True, metavar="METRIC:MS", help="ttft, tpot, itl or e2e.")
@click.option("--ends", is_flag=True, help="The model may end its answers (no ignore_eos).")
@click.option("--seed", default=0, show_default=True, help="Of prompts and arrivals.")
@click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    type=click.FloatRange(0.1, 86400),
    help="Seconds of a whole request.",
)
@_output
@json_option
def serve(
    url: str,
    key: str | None,
    model: str | None,
    concurrency: tuple[int, ...] | None,
    rate: tuple[float, ...] | None,
    goodput: tuple[str, ...],
    folder: Path | None,
    as_json: bool,
    **load: Any,
) -> None:
    """Load a server of OpenAI's protocol, and say what its users would see."""
    from qexport.runtime.bench.serve import (
        ServeSettings,
        check_address,
        measure_serving,
        parse_goodput,
    )
    from qexport.runtime.bench.serve_page import serve_page

    if (concurrency is None) == (rate is None):
        raise InputError("give either --concurrency or --rate.")
    check_address(url, key)
    settings = ServeSettings(
        url=url,
        levels=tuple(map(float, rate or concurrency or ())),
        open_loop=rate is not None,
        output=load.pop("tokens"),
        model=model,
        key=key,
        goodput=parse_goodput(goodput),
        **load,
    )
    _check(folder)
    result = measure_serving(settings, _tell)
    _report(result, serve_page(result), folder, as_json)
    failed = sum(level["failed"] for level in result["levels"])
    reasons = [error for level in result["levels"] for error in level["errors"]]
    _end_with([f"{failed} requests failed, the first with {reasons[0]}"] if failed else [])


def _end_with(failures: list[str]) -> None:
    """Exit 1 where something failed; the report has what went well."""
    for failure in failures:
        _tell(failure)
    if failures:
        click.get_current_context().exit(1)


def _shape(text: str) -> tuple[int, int]:
    out, _, inputs = text.partition("x")
    if not (out.isdecimal() and inputs.isdecimal() and 0 < int(out) * int(inputs) < 1 << 31):
        raise InputError(f"--shape {text}: give rows and inputs, as in 4096x4096.")
    return int(out), int(inputs)


def _check(folder: Path | None) -> None:
    """Whether a report can be written, before anything is measured."""
    from qexport.output import check_writable

    if folder is not None:
        check_writable(folder, "report")


def _tell(text: str) -> None:
    progress_console().print(text, highlight=False, soft_wrap=True)


def _report(result: dict[str, Any], page: "Page", folder: Path | None, as_json: bool) -> None:
    from qexport.output import atomic_folder, mark
    from qexport.runtime.bench.report import table_text, write_report

    if folder is not None:
        with atomic_folder(folder, "report") as made:
            write_report(made, result, page)
            mark(made, "report")
    _tell(page.verdict)
    if as_json:
        print_json(result)
    else:
        click.echo("\n\n".join(table_text(table) for table in page.tables if table.rows))
