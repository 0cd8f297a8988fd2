"""`qexport train`."""

from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qexport.cli.common import Command, json_option, print_json, progress_console, size
from qexport.cli.familiar import translated

_EPILOG = """\b
Examples:
  qexport train --smoke
  qexport train ./SmolLM2-135M --data builtin --bits 2 --group-size 64 --max-steps 100 -o run
  qexport train org/model --data chats.jsonl --bits 3 --config run.yaml -o run

A run that was killed goes on from its last checkpoint when the same command is given again.
Options of ParetoQ's scripts are understood too (--w_bits, --input_model_filename, ...)."""


class _TrainCommand(Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """ParetoQ's own options too."""
        return super().parse_args(ctx, translated(args, partial(click.echo, err=True)))


@click.command(cls=_TrainCommand, epilog=_EPILOG)
@click.argument("model", required=False)
@click.option(
    "--data",
    multiple=True,
    metavar="SOURCE[=WEIGHT]",
    help="builtin, a .jsonl or .txt file, or a hub dataset id; several are mixed.",
)
@click.option(
    "--bits",
    type=click.Choice(["1", "1.58", "2", "3", "4", "16"]),
    help="Width of a weight; 16 is a dense fine-tuning, by which to judge the others.",
)
@click.option("--group-size", default=-1, help="Inputs that share a scale; -1 is per channel.")
@click.option(
    "--target",
    metavar="gguf:BLOCK",
    help="gguf:Q2_K or gguf:Q3_K: train on what that block holds exactly; sets bits and groups.",
)
@click.option("--include", multiple=True, metavar="PATTERN", help="Quantize these layers alone.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these dense: '*.o_proj'.")
@click.option(
    "--module-bits",
    multiple=True,
    metavar="PATTERN=BITS[:GROUP]",
    help="Widths of their own: '*.down_proj=4:32'; the first that fits counts.",
)
@click.option(
    "--init", type=click.Path(path_type=Path), help="A RUN of `qexport quantize` to begin with."
)
@click.option("--max-steps", type=int, help="Optimizer steps; default one pass over the data.")
@click.option("--max-length", default=512, show_default=True, help="Tokens in a window.")
@click.option("--batch-size", default=4, show_default=True, help="Windows in a forward pass.")
@click.option("--gradient-accumulation", default=1, show_default=True, help="Passes in a step.")
@click.option(
    "--recipe", default="paretoq", show_default=True, help="paretoq or fast: sets what follows."
)
@click.option("--lr", type=float, help="Peak rate of weights.")
@click.option("--scale-lr", type=float, help="Peak rate of scales.")
@click.option("--distill", type=float, help="Share of the loss that is KL from the dense model.")
@click.option(
    "--temperature", type=float, help="Softmax temperature of teacher and student for --distill."
)
@click.option(
    "--gradient",
    type=click.Choice(["paper", "stable"]),
    help="Slope of rounding: the identity, or StableQAT's.",
)
@click.option("--mix-steps", type=int, help="Pull weights to their codes every so many steps.")
@click.option("--mix", type=float, help="Share of a weight that is kept then.")
@click.option("--block-epochs", type=int, help="Passes of the block-wise start; 0 for none.")
@click.option("--block-windows", type=int, help="Windows of text for the block-wise start.")
@click.option("--block-batch", type=int, help="Windows at a time in it.")
@click.option("--block-compensated", type=int, help="Windows for GPTQ's rounding before it.")
@click.option("--block-lr", type=float, help="Its peak rate of weights.")
@click.option("--block-scale-lr", type=float, help="Its peak rate of scales.")
@click.option(
    "--phase",
    type=click.Choice(["all", "block", "end"]),
    default="all",
    help="All, blocks alone, or end to end alone.",
)
@click.option(
    "--teacher",
    type=click.Choice(["cached", "live"]),
    default="cached",
    help="Ask the dense model once, or keep it in memory.",
)
@click.option("--teacher-top-k", default=64, show_default=True, help="Tokens it tells; 0 for all.")
@click.option("--warmup", default=0.05, show_default=True, help="Share of steps that warm up.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1))
@click.option(
    "--loss-on",
    type=click.Choice(["all", "assistant"]),
    default="all",
    show_default=True,
    help="Of conversations: every token, or what the assistant says.",
)
@click.option("--eval-data", help="Held-out text; default a part of --data.")
@click.option("--scale-init", type=click.Choice(["mse", "paper"]), default="mse", show_default=True)
@click.option(
    "--scale-dtype",
    type=click.Choice(["portable", "float32"]),
    default="portable",
    show_default=True,
    help="portable: values that fp16 and bf16 both hold, so that every format is exact.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
    default="auto",
    help="Of products; masters are float32.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "adamw8bit"]),
    default="adamw",
    show_default=True,
    help="adamw8bit: moments in a quarter of the memory, by bitsandbytes.",
)
@click.option(
    "--compile/--no-compile",
    default=None,
    help="Fuse the quantizers by torch.compile; default for models that it pays for.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time.")
@click.option("--shard", is_flag=True, help="Spread the model over torchrun's processes (FSDP2).")
@click.option(
    "--deepspeed", type=click.Path(path_type=Path), help="Or by ZeRO, with this configuration."
)
@click.option(
    "--offload", is_flag=True, help="With --shard: keep parts in their hosts' memory between uses."
)
@click.option(
    "--save-steps",
    type=int,
    help="Steps between checkpoints; default: a tenth of the run, from 20 to 200.",
)
@click.option(
    "--log-steps",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Steps between losses in the report and in TensorBoard.",
)
@click.option("--resume/--no-resume", default=True, help="Go on from the output's checkpoint.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the RUN.")
@click.option("--smoke", is_flag=True, help="Try everything on a tiny random model; no arguments.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and stop.")
@json_option
def command(model: str | None, smoke: bool, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train MODEL (a folder or a hub id) on a low-bit grid, into a RUN.

    A RUN is an ordinary checkpoint folder with latent weights and scales. `qexport pack` writes it
    in any format.
    """
    if smoke:
        source = click.get_current_context().get_parameter_source
        if model or dry_run or any(source(name) == ParameterSource.COMMANDLINE for name in options):
            raise click.UsageError("--smoke has a model and options of its own; leave yours out.")
        _smoke(as_json)
        return
    required = {"MODEL": model, **{f"--{name}": options[name] for name in _REQUIRED}}
    required["--bits"] = options["bits"] or options["target"]  # which says them
    for name, value in required.items():
        if not value:
            raise click.UsageError(f"Missing {name}.", click.get_current_context())
    from qexport.hub import local_folder
    from qexport.ranks import is_main, leave
    from qexport.selection import target_bits
    from qexport.training import TrainConfig, train

    assert model is not None
    options["bits"] = options["bits"] or target_bits(options["target"])
    config = TrainConfig(model=local_folder(model), **options)
    results = train(config, progress_console(), dry_run=dry_run)
    if is_main():
        if as_json:
            print_json(results)
        elif not dry_run:
            _report(config.output, results)
    leave()


_REQUIRED = ("data", "output")


def _report(run: Path, results: dict[str, Any]) -> None:
    loss = results.get("final_loss")
    perplexity = results.get("eval_perplexity")
    parts = [f"{results['steps']} steps"]
    if loss is not None:
        parts.append(f"last loss {loss:.3f}")
    if perplexity is not None:
        parts.append(f"held-out perplexity {perplexity:.2f}")
    click.echo(f"{run}: {', '.join(parts)}")


def _smoke(as_json: bool) -> None:
    """Train, pack and verify a tiny random model, in a folder that is removed."""
    import tempfile

    from qexport.formats import format_named, open_checkpoint
    from qexport.formats.pack import pack
    from qexport.tiny import write_tiny_model
    from qexport.training import TrainConfig, train

    with tempfile.TemporaryDirectory(prefix="qexport-smoke-") as name:
        folder = Path(name)
        config = TrainConfig(
            model=write_tiny_model(folder / "model"),
            data="builtin",
            output=folder / "run",
            bits="2",
            group_size=32,
            max_steps=20,
            max_length=64,
            lr=2e-3,
        )
        results = train(config, progress_console())
        packed = {}
        for form in ("native", "gptq"):
            report = pack(open_checkpoint(config.output), format_named(form), folder / form)
            packed[form] = report.to_json()
            if not as_json:
                total = size(report.total_bytes)
                click.echo(f"{form}: {report.held[0]}; {total}; {report.verification.describe()}")
    if as_json:
        print_json({"train": results, "pack": packed})
    else:
        click.echo(f"trained {results['steps']} steps, last loss {results['final_loss']:.3f}")
