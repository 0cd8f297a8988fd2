"""`qexport pack`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qexport.cli.common import Command, json_option, print_json, progress_console, size
from qexport.errors import InputError

if TYPE_CHECKING:
    from qexport.checkpoint import Checkpoint
    from qexport.formats.pack import PackReport

_EPILOG = """\b
Examples:
  qexport pack run --format native -o packed
  qexport pack run --format gptq -o packed-gptq
  qexport pack run --format gptq --bits 4 -o packed-gptq4   # the width that vLLM serves"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    required=True,
    help="native, gptq, gptq_v2, awq, compressed-tensors, int-quantized, humming, "
    "bitsandbytes or gguf.",
)
@click.option(
    "--bits",
    type=click.IntRange(1, 8),
    help="Width in the file; default the narrowest that is exact.",
)
@click.option(
    "--type",
    "block",
    metavar="TYPE",
    help="gguf: the block type (Q4_0, Q2_K, TQ2_0, …); default the narrowest that is exact.",
)
@click.option(
    "--embeddings",
    type=click.Choice(["exact", "f16", "q8_0", "q6_k"]),
    default="exact",
    help="gguf: how embedding and head are stored; the last two want --allow-lossy.",
)
@click.option(
    "--allow-lossy",
    is_flag=True,
    help="Let the format round scales, minima and embeddings (never codes to another grid), and "
    "report the error; verify then says NOT exact.",
)
@click.option(
    "--dry-run", is_flag=True, help="Read everything, say how it would be held, and write nothing."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to write; a packed folder that is there already is replaced.",
)
@json_option
def command(
    run: Path,
    format: str,
    bits: int | None,
    block: str | None,
    embeddings: str,
    allow_lossy: bool,
    dry_run: bool,
    output: Path,
    as_json: bool,
) -> None:
    """Write RUN in a format that engines read.

    The weights are held exactly or not at all; the written files are read back and compared before
    the folder appears.
    """
    # torch reads it as it allocates for the first time: pages of 2 MiB, a fifth less time
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from qexport.formats import Options, format_named, open_checkpoint
    from qexport.formats.pack import check_output, holdings, pack, rehearse

    target = format_named(format)
    if output.suffix == ".gguf":
        raise InputError(
            f"-o {output} is made a folder, and the file in it model.gguf; choose another name."
        )
    options = Options(bits, block and block.upper(), embeddings, allow_lossy)
    source = open_checkpoint(run)
    if dry_run:
        held = holdings(source, rehearse(source, target, options))
        if as_json:
            print_json({"format": format, "held": held})
        else:
            click.echo("\n".join(held))
        return
    check_output(source, output)
    replaced = f", in place of what {output} holds" if output.exists() else ""
    progress_console().print(f"packing {run} as {format}{replaced}", highlight=False)
    report = pack(source, target, output, options)
    if as_json:
        print_json(report.to_json())
    else:
        _print(source, report, output)


def _print(source: "Checkpoint", report: "PackReport", output: Path) -> None:
    from qexport.experts import expert_of
    from qexport.formats.vllm_support import unlike_parts, vllm_support

    for line in report.held:
        click.echo(line)
    click.echo(
        f"{output}: {size(report.total_bytes)}, of which quantized {size(report.quantized_bytes)} "
        f"({report.bits_per_weight:.4g} bits per weight)"
    )
    click.echo(report.verification.describe())
    experts = any(map(expert_of, source.modules))
    stored = [verdict["stored"] for verdict in report.verdicts]
    unlike = unlike_parts(source)
    click.echo(vllm_support(report.format, stored, experts=experts, unlike=unlike).sentence)
