"""`qexport inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qexport.cli.common import Command, json_option, print_json, size

if TYPE_CHECKING:
    from qexport.checkpoint import Entry

_EPILOG = """\b
Example:
  qexport inspect packed --json"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--modules", "show_modules", is_flag=True, help="A line for every module.")
@json_option
def command(path: Path, show_modules: bool, as_json: bool) -> None:
    """Show what a checkpoint holds: its layout, schemes, bits per weight and sizes."""
    from qexport.checkpoint import module_of, weight_files
    from qexport.formats import open_checkpoint

    checkpoint = open_checkpoint(path)
    modules: dict[str, dict[str, Any]] = {}
    for name, entry in checkpoint.entries.items():
        if entry.scheme is not None or entry.stored:
            modules[module_of(name)] = _module(entry, checkpoint.layout)
    dense = [e for e in checkpoint.entries.values() if e.scheme is None and not e.stored]
    result = {
        "path": str(path),
        "layout": checkpoint.layout,
        "model_type": checkpoint.config.get("model_type"),
        "modules": modules,
        "quantized_weights": sum(m["shape"][0] * m["shape"][1] for m in modules.values()),
        "dense_tensors": len(dense),
        "dense_bytes": sum(e.stored_bytes for e in dense),
        "file_bytes": sum(file.stat().st_size for file in weight_files(path)),
    }
    if as_json:
        print_json(result)
        return
    _print(result, show_modules)


def _module(entry: "Entry", layout: str) -> dict[str, Any]:
    out, inputs = entry.shape[0], entry.shape[1]
    scheme = str(entry.scheme) if entry.scheme is not None else entry.stored
    if entry.scheme is not None and entry.stored:
        scheme = f"{scheme}, in {entry.stored}"
    bits = entry.stored_bytes * 8 / (out * inputs)
    if entry.scheme is not None and layout in ("run", "paretoq"):  # the file holds latent weights
        bits = entry.scheme.bits_per_weight(inputs)
    return {"scheme": scheme, "shape": [out, inputs], "bits_per_weight": bits}


def _print(result: dict[str, Any], show_modules: bool) -> None:
    click.echo(f"{result['path']}: {result['layout']} checkpoint, {result['model_type']}")
    groups: dict[str, list[tuple[int, float]]] = {}
    for name, module in result["modules"].items():
        out, inputs = module["shape"]
        weights = out * inputs
        groups.setdefault(module["scheme"], []).append((weights, module["bits_per_weight"]))
        if show_modules:
            width = f"{module['bits_per_weight']:.4g} bits per weight"
            click.echo(f"  {name} [{out}, {inputs}]: {module['scheme']}, {width}")
    for scheme, found in groups.items():
        bits = sum(count * each for count, each in found) / sum(count for count, _ in found)
        click.echo(f"  {len(found)} modules: {scheme}, {bits:.4g} bits per weight")
    click.echo(f"  {result['dense_tensors']} dense tensors, {size(result['dense_bytes'])}")
    click.echo(f"  {size(result['file_bytes'])} of weights on disk")
