"""`qexport plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qexport.cli.common import Command, Numbers, json_option, print_json, progress_console, size
from qexport.cli.schemes import BITS, scheme_of
from qexport.errors import InputError

if TYPE_CHECKING:
    from qexport.grid import Scheme
    from qexport.runtime.advice import Advice
    from qexport.runtime.hardware import Hardware
    from qexport.runtime.plan import Model, Times

_EPILOG = """\b
Examples:
  qexport plan ./Llama-3.1-8B --bits 2 --group-size 128 --gpu h200
  qexport plan meta-llama/Llama-3.1-8B --gpu l4 --for gpu-serving
  qexport plan ./SmolLM2-135M --bits 4 --group-size 64 --cpu here --context 512 --plot plan.svg

\b
GPUs: b200, h200, h100, h100-pcie, a100-80, a100-40, l40s, l4, a10, t4,
rtx5090, rtx4090, rtx3090. CPUs: epyc-9754, epyc-9654, epyc-7763, xeon-8592,
xeon-8480, ryzen-9950x, ryzen-7950x, core-14900k. Either may be `here`."""

_HERE = "here"
_ROOFLINE, _MEASURED = "a roofline", "measured with random weights"


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("model")
@click.option("--bits", type=click.Choice(list(BITS)), help="Width of a weight; or --for.")
@click.option("--group-size", default=-1, help="Inputs that share a scale; -1 is per channel.")
@click.option("--gpu", metavar="NAME", help="See below; `here` measures this machine's.")
@click.option("--cpu", metavar="NAME", help="The same.")
@click.option(
    "--for",
    "purpose",
    type=click.Choice(["gpu-serving", "offline-batch", "cpu", "finetune"]),
    help="Recommend width, groups and format, and go on with those.",
)
@click.option("--context", default=4096, show_default=True, type=click.IntRange(1, 1 << 24))
@click.option("--prompt", default=1024, show_default=True, type=click.IntRange(1, 1 << 24))
@click.option("--batch", type=Numbers(), help="Sequences at a time; default 1 to 1024, here to 32.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="SVG to write.")
@json_option
def command(
    model: str,
    bits: str | None,
    group_size: int,
    gpu: str | None,
    cpu: str | None,
    purpose: str | None,
    context: int,
    prompt: int,
    batch: tuple[int, ...] | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Reckon sizes, memory, engines and times of MODEL, a folder or hub id; its config is enough.

    Times for a named device are a roofline: what it allows at its best, without any overhead.
    `here` runs the model's sizes with random weights on this machine, and extrapolates what is too
    large. Weight-only quantization makes steps shorter while weights are what they wait for: at the
    batch that is named it has stopped to be worth it.
    """
    from qexport.checkpoint import read_config
    from qexport.hub import local_folder
    from qexport.runtime.families import decoder_config
    from qexport.runtime.plan import Model

    if (gpu is None) == (cpu is None):
        raise InputError("name a device, by --gpu or by --cpu.")
    if bits is None and purpose is None:
        raise InputError("give --bits, or a purpose by --for.")
    hardware = _hardware(gpu, cpu)
    fields = read_config(local_folder(model, ["config.json"]))
    config = decoder_config(fields)
    if isinstance(config, str):
        raise InputError(f"{model} cannot be reckoned: {config}.")
    dims = Model(config)
    advice = None
    if purpose is not None:
        advice = _advise(purpose, dims, hardware, context)
        bits, group_size = bits or advice.bits or "4", advice.group_size or -1
    scheme = scheme_of(bits or "4", group_size)
    dims.check(scheme)
    here = _HERE in (gpu, cpu)
    batches = batch or ((1, 2, 4, 8, 16, 32) if here else tuple(1 << n for n in range(11)))
    found = _reckon(dims, scheme, hardware, context, prompt, batches)
    if here:
        _add_times(found, _measured(fields, scheme, batches, context, prompt), _MEASURED)
    if advice is not None:
        found["advice"] = vars(advice)
    if plot is not None:
        plot.write_text(_chart(found), encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        _print(found)


def _hardware(gpu: str | None, cpu: str | None) -> "Hardware":
    from qexport.runtime.hardware import CPUS, GPUS

    option, name, known = ("--gpu", gpu, GPUS) if gpu is not None else ("--cpu", cpu, CPUS)
    if name in known:
        return known[name]
    if name != _HERE:
        raise InputError(f"there is no {option} {name}; there are here, {', '.join(known)}.")
    import torch

    from qexport.errors import UnsupportedError
    from qexport.runtime.bench.machine import roofs
    from qexport.runtime.loader import best_device

    device = best_device()
    if device.type != ("cuda" if gpu is not None else "cpu"):
        other = "--gpu here" if gpu is None else "--cpu here"
        raise UnsupportedError(f"this machine's models run on {device.type}; ask for {other}.")
    torch.set_grad_enabled(False)
    return roofs(device)


def _advise(purpose: str, model: "Model", hardware: "Hardware", context: int) -> "Advice":
    from qexport.runtime.advice import advise

    return advise(purpose, model, hardware, context)


def _measured(
    fields: dict[str, Any],
    scheme: "Scheme",
    batches: tuple[int, ...],
    context: int,
    prompt: int,
) -> "dict[str, Times]":
    """Of the scheme, bfloat16, and on CPUs int8 weights with int8 activations."""
    from qexport.grid import INT8, Scheme
    from qexport.runtime.loader import best_device
    from qexport.runtime.timing import measure_times

    console = progress_console()
    sides: dict[str, Scheme | None] = {scheme.label: scheme, "bfloat16": None}
    if best_device().type == "cpu":
        sides["w8a8"] = Scheme(INT8)
    found: dict[str, Times] = {}
    for name, side in sides.items():
        console.print(f"timing {name} with random weights", highlight=False)
        found[name] = measure_times(fields, side, batches, context, prompt)
    return found


def _reckon(
    model: "Model",
    scheme: "Scheme",
    hardware: "Hardware",
    context: int,
    prompt: int,
    batches: tuple[int, ...],
) -> dict[str, Any]:
    """Everything that needs no run; times are rooflines."""
    import qexport.runtime.serving  # noqa: F401  # its libraries are part of the memory
    from qexport.grid import INT8
    from qexport.grid import Scheme as Form
    from qexport.runtime.bench.machine import process_bytes
    from qexport.runtime.plan import (
        Roofline,
        file_sizes,
        kernel_rows,
        memory_bytes,
        most_sequences,
    )

    runtime = process_bytes() if hardware.kind == "cpu" else 0
    name = scheme.label
    schemes = {name: scheme, "bfloat16": None, "w8a8": Form(INT8)}
    sides: dict[str, Times] = {
        name: Roofline(model, hardware, scheme),
        "bfloat16": Roofline(model, hardware, None),
    }
    if hardware.int8 or hardware.kind == "cpu":
        sides["w8a8"] = Roofline(model, hardware, Form(INT8), int8=True)
    found = {
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
            name: most_sequences(model, hardware, schemes[name], context) for name in sides
        },
        "runtime_bytes": runtime,
        "memory_bytes": {
            name: {
                batch: round(runtime + memory_bytes(model, schemes[name], batch, context))
                for batch in batches
            }
            for name in sides
        },
        "formats": file_sizes(model, scheme),
        "kernels": kernel_rows(model, scheme, hardware),
        "batches": batches,
    }
    _add_times(found, sides, _ROOFLINE)
    return found


def _add_times(found: dict[str, Any], sides: "dict[str, Times]", kind: str) -> None:
    """Times, what kind they are, and the batches at which they cross."""
    from qexport.runtime.plan import crossover

    context, batches = found["context"], found["batches"]
    packed = sides[found["scheme"]]
    others = {name: side for name, side in sides.items() if side is not packed}
    most = None if kind == _ROOFLINE else max(batches)
    found["times_are"] = kind
    found["ttft_seconds"] = {n: side.prompt_seconds(found["prompt"]) for n, side in sides.items()}
    found["tpot_seconds"] = {
        name: {batch: side.decode_seconds(batch, context) for batch in batches}
        for name, side in sides.items()
    }
    found["weight_only_pays_below"] = crossover(packed, others, context, most)


def _chart(found: dict[str, Any]) -> str:
    from qexport.svg import line_chart

    lines = {
        name: [(batch, seconds * 1e3) for batch, seconds in times.items()]
        for name, times in found["tpot_seconds"].items()
    }
    title = f"{found['scheme']} on {found['hardware']}, {found['context']} tokens each"
    title += ", measured" if found["times_are"] == _MEASURED else ": roofline"
    return line_chart(title, "sequences at a time", "milliseconds a step", lines)


def _print(found: dict[str, Any]) -> None:
    if "advice" in found:
        _print_advice(found["advice"])
    weights = found["weights"]
    click.echo(
        f"{found['scheme']}: {size(weights['bytes'])} of weights "
        f"({size(weights['bfloat16_bytes'])} in bfloat16), "
        f"{size(found['cache_bytes_per_token'])} of cache a token"
    )
    fit = [f"{n} at {name}" for name, n in found["sequences_that_fit"].items() if n is not None]
    if fit:
        joined = ", ".join(fit)
        click.echo(
            f"{found['hardware']}: sequences of {found['context']} tokens that fit: {joined}"
        )
    click.echo("")
    for row in found["formats"]:
        if row["bytes"] is None:
            click.echo(f"  {row['format']:<20} refused: {row['reason']}")
        else:
            held = f"{row['verdict']} as {', '.join(row['stored'])}"
            click.echo(f"  {row['format']:<20} {size(row['bytes']):>10}  {held}. {row['vllm']}")
    click.echo("")
    for row in found["kernels"]:
        reason = "takes every matrix" if row["reason"] is None else f"not: {row['reason']}"
        click.echo(f"  kernel {row['kernel']:<13} {reason}")
    _print_times(found)


def _print_advice(advice: dict[str, Any]) -> None:
    if advice["bits"] is None:
        click.echo("Advice: keep it in bfloat16.")
    else:
        group = advice["group_size"] or "per channel"
        click.echo(
            f"Advice: {advice['bits']} bits, group size {group}, as {advice['format']}; "
            f"method: {advice['method']}."
        )
    for reason in advice["reasons"]:
        click.echo(f"  - {reason}")
    click.echo("")


def _print_times(found: dict[str, Any]) -> None:
    times, memory = found["tpot_seconds"], found["memory_bytes"]
    names = list(times)
    what = "ms a step" if found["times_are"] == _MEASURED else "least ms a step"
    click.echo(f"\n{what + ', and memory':<30}{''.join(f'{name:>24}' for name in names)}")
    for batch in times[names[0]]:
        cells = "".join(
            f"{times[name][batch] * 1e3:>12.2f}{size(memory[name][batch]):>12}" for name in names
        )
        click.echo(f"  {batch:>5} sequences at a time    {cells}")
    cells = "".join(f"{found['ttft_seconds'][name] * 1e3:>12.2f}{'':>12}" for name in names)
    click.echo(f"  to the first token of {found['prompt']:<6}{cells}")
    for name, batch in found["weight_only_pays_below"].items():
        if batch is not None:
            click.echo(
                f"{found['scheme']} takes less than nine tenths of {name}'s time below {batch} "
                "sequences at a time."
            )
        else:
            click.echo(
                f"{found['scheme']} takes less than nine tenths of {name}'s time throughout."
            )
