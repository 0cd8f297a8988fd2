"""`qexport quantize`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qexport.cli.common import Command, json_option, print_json, progress_console

if TYPE_CHECKING:
    from qexport.quantization import QuantizeConfig

_EPILOG = """\b
Examples:
  qexport quantize ./SmolLM2-135M --method gptq --bits 4 --group-size 64 \\
      --calibration builtin -o run
  qexport quantize ./SmolLM2-135M --method gptq --bits 2 --asym --group-size 64 \\
      --calibration chats.jsonl -o run
  qexport quantize ./SmolLM2-135M --method rtn --bits 8 -o run

\b
Methods: rtn (nearest codes, by scales of least squared error; needs no text), gptq,
awq, signround (GPTQ, and then learned by what it does to a block's output), w8a8
(SmoothQuant; `qexport pack --format int-quantized` serves it with int8 activations),
kquant (K-quants of GGUF, 2 to 6 bits, with GPTQ's codes; blocks of 32 where a row is not
whole super-blocks), nf4 (bitsandbytes' codebook; needs no text).
A run that was killed goes on with its next block when the same command is given again."""


class _QuantizeCommand(Command):
    def recipe(self, values: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """msModelSlim's recipes, and GPTQ's and AWQ's names."""
        from qexport.quantization.recipe import options_of

        return options_of(values, partial(click.echo, err=True))


@click.command(cls=_QuantizeCommand, epilog=_EPILOG)
@click.argument("model")
@click.option("--method", required=True, help="See below.")
@click.option("--bits", help="1, 1.58, 2, 3, 4, 5, 6 or 8; or --target-bpw.")
@click.option(
    "--target-bpw", type=float, help="Mix widths of 2, 3, 4 and 8 to so many bits per weight."
)
@click.option(
    "--target", metavar="gguf:BLOCK", help="gguf:Q2_K or gguf:Q3_K: on what that holds exactly."
)
@click.option("--group-size", type=int, help="Inputs that share a scale; -1 is per channel.")
@click.option("--per-tensor", is_flag=True, help="One scale a layer; with --group-size -1.")
@click.option(
    "--double-quant/--no-double-quant", default=True, help="NF4: scales of 8 bits, not of 32."
)
@click.option("--sym/--asym", default=True, help="A zero point for all, or one of each group.")
@click.option("--grid", help="Another grid than --bits and --sym say: int2, say, or seq2.")
@click.option("--calibration", metavar="SOURCE", help="builtin, a .jsonl or .txt, or a dataset id.")
@click.option("--samples", default=128, show_default=True, help="Windows of it.")
@click.option("--length", default=512, show_default=True, help="Tokens in a window.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Quantize these layers alone.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these dense: '*.o_proj'.")
@click.option(
    "--module-bits",
    multiple=True,
    metavar="PATTERN=BITS[:GROUP[:METHOD]]",
    help="Of their own: '*.down_proj=4:32:rtn'; 16 is dense; the first that fits counts.",
)
@click.option("--percdamp", default=0.01, show_default=True, help="GPTQ: damping of the Hessian.")
@click.option("--block-size", default=128, show_default=True, help="GPTQ: columns at a time.")
@click.option(
    "--act-order/--no-act-order", default=True, help="GPTQ: the most active inputs first."
)
@click.option("--refits", default=2, show_default=True, help="GPTQ: times scales are fitted again.")
@click.option("--iterations", default=100, show_default=True, help="SignRound: steps a block.")
@click.option("--lr", type=float, help="SignRound: first step of weights, in units of a scale.")
@click.option("--smooth", default=0.5, show_default=True, help="W8A8: range moved to weights.")
@click.option(
    "--unseen-experts",
    type=click.Choice(["nearest", "error"]),
    default="nearest",
    show_default=True,
    help="What is done with experts that saw less than 0.5 % of the tokens.",
)
@click.option("--true-sequential/--no-true-sequential", default=True)
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto")
@click.option("--batch-size", default=8, show_default=True, help="Windows in a forward pass.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1))
@click.option("--resume/--no-resume", default=True, help="Go on with the output's next block.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the RUN."
)
@click.option("--dry-run", is_flag=True, help="Say what would be quantized, and stop.")
@json_option
def command(model: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Quantize MODEL (a folder or a hub id) without training it, into a RUN.

    The RUN is an ordinary checkpoint folder with codes and scales. `qexport pack` writes it in any
    format.
    """
    from dataclasses import fields

    from qexport.hub import local_folder
    from qexport.quantization import GptqOptions, QuantizeConfig, SignRoundOptions, quantize_model
    from qexport.ranks import is_main, leave

    _complete(options)
    own = {name.name: options.pop(name.name) for name in fields(GptqOptions)}
    learning = {name: options.pop(name) for name in ("iterations", "lr")}
    config = QuantizeConfig(
        model=local_folder(model),
        gptq=GptqOptions(**own),
        signround=SignRoundOptions(**learning),
        **options,
    )
    results = quantize_model(config, progress_console(), dry_run=dry_run)
    if is_main():
        if as_json:
            print_json(results)
        elif not dry_run:
            _report(config, results)
    leave()


def _report(config: "QuantizeConfig", results: dict[str, Any]) -> None:
    errors = [layer["error"] for layer in results["layers"].values()]
    mean = sum(errors) / len(errors)
    what = "outputs" if config.looks else "weights"
    click.echo(
        f"{config.output}: {len(errors)} layers, {results['bits_per_weight']:.2f} bits per "
        f"weight, mean error of their {what} {mean:.2%}"
    )
    for name, key in (("before", "error_before"), ("after", "error")):
        blocks = [block[key] for block in results.get("blocks", ())]
        if blocks:
            click.echo(f"blocks {name} learning: mean error {sum(blocks) / len(blocks):.2%}")


def _complete(options: dict[str, Any]) -> None:
    """Set `bits` and `group_size` where something else says them."""
    from qexport.selection import target_bits

    target, method = options["target"], options["method"]
    if method == "nf4":
        options["bits"] = options["bits"] or "4"
    if (options["bits"] is None) == (options["target_bpw"] is None and target is None):
        raise click.UsageError(
            "give one of --bits, --target and --target-bpw.", click.get_current_context()
        )
    if target is not None:
        options["bits"] = target_bits(target)
    options["bits"] = options["bits"] or "4"
    if options["group_size"] is None and method == "nf4":
        options["group_size"] = 64
