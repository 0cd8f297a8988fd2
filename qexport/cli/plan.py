"""`qexport plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qexport.cli.common import Command, json_option, print_json, size
from qexport.errors import InputError

if TYPE_CHECKING:
    from qexport.grid import Scheme
    from qexport.runtime.hardware import Hardware
    from qexport.runtime.plan import Model

_EPILOG = """\b
Examples:
  qexport plan ./Llama-3.1-8B --bits 2 --group-size 128 --gpu h200
  qexport plan ./SmolLM2-135M --bits 4 --group-size 64 --gpu l4 --context 2048 --plot plan.svg

\b
GPUs: b200, h200, h100, h100-pcie, a100-80, a100-40, l40s, l4, a10, t4,
rtx5090, rtx4090, rtx3090."""

_BITS = {"1": "binary", "1.58": "ternary", "2": "seq2", "3": "int3", "4": "int4", "8": "int8"}
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--bits", type=click.Choice(list(_BITS)), required=True, help="Width of a weight.")
@click.option("--group-size", default=-1, help="Inputs that share a scale; -1 is per channel.")
@click.option("--gpu", required=True, metavar="NAME", help="See below.")
@click.option("--context", default=4096, show_default=True, type=click.IntRange(1, 1 << 24))
@click.option("--prompt", default=1024, show_default=True, type=click.IntRange(1, 1 << 24))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="SVG to write.")
@json_option
def command(
    model: Path,
    bits: str,
    group_size: int,
    gpu: str,
    context: int,
    prompt: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Reckon sizes, memory, engines and least times of MODEL (its config.json is enough).

    Times are a roofline: what the device allows at its best, without any overhead. Measured ones
    are above; `benchmarks/` says by how much. Weight-only quantization makes steps shorter while
    weights are what they wait for: at the batch that is named it has stopped to be worth it.
    """
    from qexport.checkpoint import read_config
    from qexport.grid import GRIDS, Scheme
    from qexport.runtime.families import decoder_config
    from qexport.runtime.hardware import GPUS
    from qexport.runtime.plan import Model

    if gpu not in GPUS:
        raise InputError(f"there is no --gpu {gpu}; there are {', '.join(GPUS)}.")
    if group_size < 1 and group_size != -1:
        raise InputError("--group-size is positive, or -1 for one scale per channel.")
    config = decoder_config(read_config(model))
    if isinstance(config, str):
        raise InputError(f"{model} cannot be reckoned: {config}.")
    scheme = Scheme(GRIDS[_BITS[bits]], None if group_size == -1 else group_size)
    dims = Model(config)
    dims.check(scheme)
    found = _reckon(dims, scheme, GPUS[gpu], context, prompt)
    if plot is not None:
        plot.write_text(_chart(found), encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        _print(found)


def _reckon(
    model: "Model", scheme: "Scheme", hardware: "Hardware", context: int, prompt: int
) -> dict[str, Any]:
    from qexport.grid import INT8
    from qexport.grid import Scheme as Form
    from qexport.runtime.plan import Roofline, crossover, file_sizes, most_sequences

    name = str(scheme).partition(",")[0]
    sides = {
        name: Roofline(model, hardware, scheme),
        "bfloat16": Roofline(model, hardware, None),
    }
    if hardware.int8:
        sides["w8a8"] = Roofline(model, hardware, Form(INT8), int8=True)
    return {
        "scheme": name,
        "hardware": hardware.name,
        "context": context,
        "prompt": prompt,
        "weights": {
            "quantized": model.stored,
            "dense": model.dense,
            "bytes": round(model.weight_bytes(scheme)),
            "bfloat16_bytes": round(model.weight_bytes(None)),
        },
        "cache_bytes_per_token": model.cache_bytes(),
        "sequences_that_fit": {
            name: most_sequences(model, hardware, side.scheme, context)
            for name, side in sides.items()
        },
        "formats": file_sizes(model, scheme),
        "ttft_seconds": {name: side.prompt_seconds(prompt) for name, side in sides.items()},
        "tpot_seconds": {
            name: {batch: side.decode_seconds(batch, context) for batch in _BATCHES}
            for name, side in sides.items()
        },
        "weight_only_pays_below": crossover(model, hardware, scheme, context),
    }


def _chart(found: dict[str, Any]) -> str:
    from qexport.svg import line_chart

    lines = {
        name: [(batch, seconds * 1e3) for batch, seconds in times.items()]
        for name, times in found["tpot_seconds"].items()
    }
    title = f"{found['scheme']} on {found['hardware']}, {found['context']} tokens each: roofline"
    return line_chart(title, "sequences at a time", "milliseconds a step", lines)


def _print(found: dict[str, Any]) -> None:
    weights = found["weights"]
    click.echo(
        f"{found['scheme']}: {size(weights['bytes'])} of weights "
        f"({size(weights['bfloat16_bytes'])} in bfloat16), "
        f"{size(found['cache_bytes_per_token'])} of cache a token"
    )
    fit = ", ".join(f"{count} at {name}" for name, count in found["sequences_that_fit"].items())
    click.echo(f"{found['hardware']}: sequences of {found['context']} tokens that fit: {fit}\n")
    for row in found["formats"]:
        if row["bytes"] is None:
            click.echo(f"  {row['format']:<20} refused: {row['reason']}")
        else:
            held = f"{row['verdict']} as {', '.join(row['stored'])}"
            click.echo(f"  {row['format']:<20} {size(row['bytes']):>10}  {held}. {row['vllm']}")
    names = list(found["tpot_seconds"])
    click.echo(f"\nleast milliseconds a step      {''.join(f'{name:>14}' for name in names)}")
    for batch in _BATCHES:
        cells = "".join(f"{found['tpot_seconds'][n][batch] * 1e3:>14.2f}" for n in names)
        click.echo(f"  {batch:>5} sequences at a time      {cells}")
    cells = "".join(f"{found['ttft_seconds'][name] * 1e3:>14.2f}" for name in names)
    click.echo(f"  to the first token of {found['prompt']:<8}{cells}")
    for name, batch in found["weight_only_pays_below"].items():
        if batch is not None:
            click.echo(
                f"{found['scheme']} takes less than nine tenths of {name}'s time below {batch} "
                "sequences at a time."
            )
