"""`qexport eval`."""

from pathlib import Path

import click

from qexport.cli.common import Command, json_option, print_json, progress_console

_EPILOG = """\b
Examples:
  qexport eval packed --data builtin
  qexport eval packed --data held-out.jsonl --reference dense --json"""


@click.command("eval", cls=Command, epilog=_EPILOG)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--data", default="builtin", show_default=True, help="As for train; all of a file.")
@click.option("--window", default=512, show_default=True, help="Predictions in a forward pass.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Stop after so many predictions.")
@click.option("--reference", type=click.Path(path_type=Path), help="A checkpoint to compare with.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto"
)
@json_option
def command(
    path: Path,
    data: str,
    window: int,
    max_tokens: int | None,
    reference: Path | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Measure the perplexity of PATH, token-weighted over windows that share one
    token: each is predicted once.

    Figures whose `tokens_sha256` is equal were measured on the same tokens.
    """
    from qexport.data import documents, tokenize
    from qexport.evaluate import evaluate
    from qexport.runtime.loader import open_model

    if window < 1:
        raise click.UsageError("--window is less than 1.", click.get_current_context())
    model, tokenizer, _ = open_model(path, dtype)
    other = open_model(reference, dtype)[0] if reference is not None else None
    limit = None if max_tokens is None else max_tokens + 1
    tokens = tokenize(documents(data, "eval", tokenizer), tokenizer, limit)
    console = progress_console()
    with console.status("evaluating") as status:
        result = evaluate(
            model, tokens, window, other, lambda done, of: status.update(f"{done}/{of} tokens")
        )
    if as_json:
        print_json({"path": str(path), "data": data, **result.to_json()})
        return
    click.echo(f"{path}: perplexity {result.perplexity:.3f} over {result.tokens} tokens of {data}")
    if result.kl_divergence is not None:
        click.echo(
            f"  against {reference} (perplexity {result.reference_perplexity:.3f}): "
            f"KL {result.kl_divergence:.5f} nats, same top token {result.top1_agreement:.1%}"
        )
