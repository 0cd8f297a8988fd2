"""`qexport inspect`."""

from pathlib import Path
from typing import Any

import click

from qexport.cli.common import Command, json_option, print_json, size

_EPILOG = """\b
Example:
  qexport inspect packed --json"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--modules", "show_modules", is_flag=True, help="A line for every module.")
@json_option
def command(path: Path, show_modules: bool, as_json: bool) -> None:
    """Show what a checkpoint holds: its layout, schemes, bits per weight and sizes."""
    from qexport.formats import FORMATS, open_checkpoint

    checkpoint = open_checkpoint(path)
    form = FORMATS.get(checkpoint.layout)
    modules: dict[str, dict[str, Any]] = {}
    for name, (scheme, shape) in checkpoint.modules.items():
        bits = form.bits_per_weight(scheme, shape[1]) if form else scheme.bits_per_weight(shape[1])
        modules[name] = {"scheme": str(scheme), "shape": list(shape), "bits_per_weight": bits}
    dense = [e for e in checkpoint.entries.values() if e.scheme is None]
    result = {
        "path": str(path),
        "layout": checkpoint.layout,
        "model_type": checkpoint.config.get("model_type"),
        "modules": modules,
        "quantized_weights": sum(m["shape"][0] * m["shape"][1] for m in modules.values()),
        "dense_tensors": len(dense),
        "dense_bytes": sum(_elements(e.shape) * e.dtype.itemsize for e in dense),
        "file_bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
    }
    if as_json:
        print_json(result)
        return
    _print(result, show_modules)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _print(result: dict[str, Any], show_modules: bool) -> None:
    click.echo(f"{result['path']}: {result['layout']} checkpoint, {result['model_type']}")
    groups: dict[tuple[str, float], int] = {}
    for name, module in result["modules"].items():
        key = (module["scheme"], module["bits_per_weight"])
        groups[key] = groups.get(key, 0) + 1
        if show_modules:
            out, inputs = module["shape"]
            width = f"{module['bits_per_weight']:.4g} bits per weight"
            click.echo(f"  {name} [{out}, {inputs}]: {module['scheme']}, {width}")
    for (scheme, bits), count in groups.items():
        click.echo(f"  {count} modules: {scheme}, {bits:.4g} bits per weight")
    click.echo(f"  {result['dense_tensors']} dense tensors, {size(result['dense_bytes'])}")
    click.echo(f"  {size(result['file_bytes'])} of weights on disk")
