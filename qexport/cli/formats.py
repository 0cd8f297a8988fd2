"""`qexport formats`."""

from typing import Any

import click

from qexport.cli.common import Command, json_option, print_json

_EPILOG = """\b
Examples:
  qexport formats
  qexport formats --in-features 576 --out-features 1536 --reasons"""
_SIGNS = {"exact": "", "embedded": "*", "refused": "-"}


@click.command(cls=Command, epilog=_EPILOG)
@click.option("--in-features", type=click.IntRange(1, 1 << 20), default=4096, show_default=True)
@click.option("--out-features", type=click.IntRange(1, 1 << 20), default=4096, show_default=True)
@click.option("--reasons", is_flag=True, help="Say why, below the table, for what is refused.")
@json_option
def command(in_features: int, out_features: int, reasons: bool, as_json: bool) -> None:
    """Show how every format holds every grid: as what, exactly or not, at how many bits.

    Bits per weight are those on disk of one matrix, scales, zero points and indices included.
    """
    from qexport.formats.table import verdict_table

    rows = verdict_table((out_features, in_features))
    if as_json:
        print_json({"shape": [out_features, in_features], "rows": rows})
        return
    names = list(rows[0]["formats"])
    lines = [["grid", "group", *names]]
    lines += [
        [row["grid"], _group(row), *(_cell(row["formats"][name]) for name in names)] for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        click.echo("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
    click.echo(f"\nFor a matrix of {out_features} outputs and {in_features} inputs with float16")
    click.echo("scales. Plain: exact. *: exact, re-coded on the grid named. -: refused.")
    if reasons:
        _print_reasons(rows)


def _group(row: dict[str, Any]) -> str:
    return "channel" if row["group_size"] is None else f"g{row['group_size']}"


def _cell(cell: dict[str, Any]) -> str:
    if cell["verdict"] == "refused":
        return _SIGNS["refused"]
    return f"{cell['stored']} {cell['bits_per_weight']:.4g}{_SIGNS[cell['verdict']]}"


def _print_reasons(rows: list[dict[str, Any]]) -> None:
    click.echo("")
    for row in rows:
        for name, cell in row["formats"].items():
            if cell["reason"]:
                click.echo(f"{row['grid']} {_group(row)}, {name}: {cell['reason']}.")
