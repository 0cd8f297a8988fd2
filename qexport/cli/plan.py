"""`qexport plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qexport.cli.common import Command, Numbers, json_option, print_json, progress_console, size
from qexport.cli.schemes import scheme_of
from qexport.errors import InputError, UnsupportedError
from qexport.widths import GRID_OF

if TYPE_CHECKING:
    from qexport.grid import Scheme
    from qexport.runtime.bench.noise import Noise
    from qexport.runtime.hardware import Hardware
    from qexport.runtime.plan import Times

_EPILOG = """\b
Examples:
  qexport plan ./Llama-3.1-8B --bits 2 --group-size 128 --gpu h200
  qexport plan meta-llama/Llama-3.1-8B --gpu l4 --for gpu-serving
  qexport plan ./SmolLM2-135M --bits 4 --group-size 64 --cpu here --context 512 --plot plan.svg

\b
GPUs: b200, h200, h100, h100-pcie, a100-80, a100-40, l40s, l4, a10, t4,
rtx5090, rtx4090, rtx3090. CPUs: epyc-9754, epyc-9654, xeon-8592, xeon-8480,
ryzen-9950x, ryzen-7950x, core-14900k. Either may be `here`. Models: the families
of our decoder, which are llama, mistral, qwen2, qwen3, smollm3, minicpm, minicpm4
and mobilellm."""

_HERE = "here"
_TOKENS = click.IntRange(1, 1 << 24)
_MEASURED = "measured with random weights"


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("model")
@click.option("--bits", type=click.Choice(list(GRID_OF)), help="Width of a weight; or --for.")
@click.option("--group-size", type=int, help="Inputs that share a scale; default -1, per channel.")
@click.option("--gpu", metavar="NAME", help="See below; `here` measures this machine's.")
@click.option("--cpu", metavar="NAME", help="The same.")
@click.option(
    "--for",
    "purpose",
    type=click.Choice(["gpu-serving", "offline-batch", "cpu", "finetune"]),
    help="Recommend width, groups and format, and go on with those.",
)
@click.option("--context", type=_TOKENS, help="Tokens of each sequence; default 4096 at most.")
@click.option("--prompt", type=_TOKENS, help="Tokens to the first one; default 1024 at most.")
@click.option("--batch", type=Numbers(), help="Sequences at a time; default 1 to 1024, here to 32.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="SVG to write.")
@json_option
def command(
    model: str,
    bits: str | None,
    group_size: int | None,
    gpu: str | None,
    cpu: str | None,
    purpose: str | None,
    context: int | None,
    prompt: int | None,
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
    import qexport.runtime.serving  # noqa: F401  # its libraries are part of the memory
    from qexport.checkpoint import read_config
    from qexport.hub import local_folder
    from qexport.runtime.advice import advise
    from qexport.runtime.bench.noise import Noise
    from qexport.runtime.families import decoder_config
    from qexport.runtime.machine import process_bytes
    from qexport.runtime.plan import Model, reckon, with_times

    _check(gpu, cpu, bits, purpose, plot)
    if purpose is not None and group_size is not None:
        raise InputError("--for recommends groups too; leave --group-size out, or give --bits.")
    gpu, cpu = (name and name.lower() for name in (gpu, cpu))
    fields = read_config(local_folder(model, ["config.json"]))
    config = decoder_config(fields)
    if isinstance(config, str):
        raise UnsupportedError(f"{model} cannot be reckoned: {config}.")
    dims = Model(config)
    context, prompt = _lengths(model, config.context, context, prompt)
    runtime = process_bytes() if cpu is not None else 0
    hardware = _hardware(gpu, cpu)
    advice = None if purpose is None else advise(purpose, dims, hardware, context)
    if advice is not None:
        bits, group_size = advice.bits or "4", advice.group_size
    scheme = scheme_of(bits or "4", -1 if group_size is None else group_size)
    dims.check(scheme)
    here = _HERE in (gpu, cpu)
    batches = batch or ((1, 2, 4, 8, 16, 32) if here else tuple(1 << n for n in range(11)))
    found = reckon(dims, scheme, hardware, context, prompt, batches, runtime)
    if here:
        noise = Noise()
        times = _measured(fields, found, scheme, noise)
        found = with_times(found, times, _MEASURED, max(batches))
        found["noise"] = {"clean": not noise.reasons(), "reasons": noise.reasons()}
    if advice is not None:
        found["advice"] = vars(advice)
    _show(found, plot, as_json)


def _show(found: dict[str, Any], plot: Path | None, as_json: bool) -> None:
    if plot is not None:
        plot.write_text(_chart(found), encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        _print(found)


def _lengths(model: str, most: int, context: int | None, prompt: int | None) -> tuple[int, int]:
    """Tokens of a sequence and of a prompt, of which a model takes `most`."""
    usual = min(4096, most)
    context, prompt = context or usual, prompt or min(1024, usual)
    longest = max(context, prompt)
    if longest > most:
        raise InputError(f"{model} has a context of {most}; {longest} is more than that.")
    return context, prompt


def _check(
    gpu: str | None, cpu: str | None, bits: str | None, purpose: str | None, plot: Path | None
) -> None:
    """Raise InputError for options that do not go together."""
    if gpu is None and cpu is None:
        raise InputError("name a device, by --gpu or by --cpu.")
    if gpu is not None and cpu is not None:
        raise InputError("name one device, by --gpu or by --cpu.")
    if (bits is None) == (purpose is None):
        raise InputError("give either --bits, or a purpose by --for.")
    if plot is not None and plot.suffix != ".svg":
        raise InputError(f"--plot writes SVG; call it {plot.with_suffix('.svg')}.")


def _hardware(gpu: str | None, cpu: str | None) -> "Hardware":
    from qexport.runtime.hardware import CPUS, GPUS

    option, name, known = ("--gpu", gpu, GPUS) if gpu is not None else ("--cpu", cpu, CPUS)
    if name in known:
        return known[name]
    if name != _HERE:
        raise InputError(f"there is no {option} {name}; there are here, {', '.join(known)}.")
    import torch

    from qexport.runtime.bench.roofs import roofs
    from qexport.runtime.loader import best_device

    device = best_device()
    if device.type != ("cuda" if gpu is not None else "cpu"):
        other = "--gpu here" if gpu is None else "--cpu here"
        raise UnsupportedError(f"this machine's models run on {device.type}; ask for {other}.")
    torch.set_grad_enabled(False)
    return roofs(device)


def _measured(
    fields: dict[str, Any], found: dict[str, Any], scheme: "Scheme", noise: "Noise"
) -> "dict[str, Times]":
    """Of every side of a plan, at the batches that there is room for."""
    from qexport.grid import INT8, Scheme
    from qexport.runtime.timing import measure_times

    console = progress_console()
    schemes = {scheme.label: scheme, "w8a8": Scheme(INT8)}
    times: dict[str, Times] = {}
    for name, fit in found["sequences_that_fit"].items():
        console.print(f"timing {name} with random weights", highlight=False)
        batches = [batch for batch in found["batches"] if batch <= fit] or [1]
        times[name] = measure_times(
            *(fields, schemes.get(name), batches, found["context"], found["prompt"], noise)
        )
    return times


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
    if "noise" in found and not found["noise"]["clean"]:
        click.echo(f"Noisy, not to be quoted: {'; '.join(found['noise']['reasons'])}.\n")
    if "advice" in found:
        _print_advice(found["advice"])
    weights = found["weights"]
    click.echo(
        f"{found['scheme']}: {size(weights['bytes'])} of weights "
        f"({size(weights['unpacked_bytes'])} in {found['unpacked']}), "
        f"{size(found['cache_bytes_per_token'])} of cache a token"
    )
    fit = [f"{n:,} at {name}" for name, n in found["sequences_that_fit"].items() if n is not None]
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
    times, memory, fit = found["tpot_seconds"], found["memory_bytes"], found["sequences_that_fit"]
    names, first = list(times), found["ttft_seconds"]
    what = "ms a step" if found["times_are"] == _MEASURED else "least ms a step"
    click.echo(f"\n{what + ', and memory':<30}{''.join(f'{name:>24}' for name in names)}")
    for batch in found["batches"]:
        cells = ""
        for name in names:
            room = fit[name] is None or batch <= fit[name]
            step = f"{times[name][batch] * 1e3:.2f}" if room else "no room"
            cells += f"{step:>12}{size(memory[name][batch]):>12}"
        click.echo(f"  {f'batch {batch}':<28}{cells}")
    first = {name: "no room" if fit[name] == 0 else f"{t * 1e3:.2f}" for name, t in first.items()}
    cells = "".join(f"{first[name]:>12}{'':>12}" for name in names)
    click.echo(f"  to the first token of {found['prompt']:<6}{cells}")
    for name in found["weight_only_pays_below"]:
        click.echo(_crossover(found, name))


def _crossover(found: dict[str, Any], other: str) -> str:
    """Where packed weights pay, as far as there is room for that."""
    scheme, batch = found["scheme"], found["weight_only_pays_below"][other]
    fit = found["sequences_that_fit"][scheme]
    if fit == 0:
        return f"{scheme} does not fit, with {found['context']} tokens."
    if found["sequences_that_fit"].get(other) == 0:
        return f"{other} does not fit beside a sequence of {found['context']} tokens."
    what = f"{scheme} takes less than nine tenths of {other}'s time"
    if batch is not None and (fit is None or batch <= fit):
        return f"{what} {'at no batch' if batch == 1 else f'below {batch} sequences at a time'}."
    if found["times_are"] == _MEASURED:
        return f"{what} up to {max(found['batches'])} sequences at a time, the most measured."
    return f"{what} throughout" + ("." if fit is None else f", up to the {fit:,} that fit.")
