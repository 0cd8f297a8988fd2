"""The native layout: any grid, half-integer zero points included, at its own width. See SPEC.md."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qexport import bits
from qexport.checkpoint import (
    CONFIG_VERSION,
    Checkpoint,
    Entry,
    Modules,
    checked_scales,
    dense_entry,
    expect,
    modules_from_json,
    modules_to_json,
)
from qexport.errors import CheckpointError
from qexport.formats.base import Format
from qexport.grid import GRIDS, Scheme
from qexport.shards import ShardReader
from qexport.tensor import QuantizedTensor

__all__ = ["Native"]


class Native(Format):
    """`<module>.qweight` uint8 [out, ceil(in*bits/8)], `<module>.scales` [out, groups]."""

    name = "native"
    grids = tuple(sorted(GRIDS.values(), key=lambda grid: grid.bits))
    scale_dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def detect(self, quantization: dict[str, Any]) -> bool:
        form = quantization.get("format")
        return quantization.get("quant_method") == "qexport" and form == "native"

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return None

    def bits_per_weight(self, scheme: Scheme, in_features: int) -> float:
        zeros = 0 if scheme.symmetric else 8 - scheme.grid.bits  # stored as whole bytes here
        return (
            scheme.bits_per_weight(in_features) + zeros * scheme.groups(in_features) / in_features
        )

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        parts = {
            f"{module}.qweight": bits.pack(tensor.codes, tensor.scheme.grid.bits),
            f"{module}.scales": tensor.scales,
        }
        if tensor.zeros is not None:
            parts[f"{module}.zeros"] = tensor.zeros
        return parts

    def quantization_config(self, modules: Modules) -> dict[str, Any]:
        return {
            "quant_method": "qexport",
            "format": "native",
            "version": CONFIG_VERSION,
            "config_groups": modules_to_json(modules),
        }

    def read(self, reader: ShardReader, config: dict[str, Any]) -> Checkpoint:
        modules = modules_from_json(config["quantization_config"])
        parts = {f"{m}.{part}" for m in modules for part in ("qweight", "scales", "zeros")}
        entries = {name: dense_entry(reader, name) for name in reader if name not in parts}
        for module, (scheme, shape) in modules.items():
            groups = (shape[0], scheme.groups(shape[1]))
            row = bits.packed_bytes(shape[1], scheme.grid.bits)
            expect(reader, f"{module}.qweight", torch.uint8, (shape[0], row))
            expect(reader, f"{module}.scales", scheme.scale_dtype, groups)
            if not scheme.symmetric:
                expect(reader, f"{module}.zeros", torch.uint8, groups)
            load = partial(_load, reader, module, scheme, shape)
            entries[f"{module}.weight"] = Entry(shape, scheme.scale_dtype, load, scheme)
        return Checkpoint(reader.folder, self.name, config, entries)


def _load(
    reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
) -> QuantizedTensor:
    codes = bits.unpack(reader.tensor(f"{module}.qweight"), scheme.grid.bits, shape[1])
    if int(codes.max()) >= scheme.grid.levels:
        raise CheckpointError(
            f"{reader.folder}: {module} holds code {int(codes.max())}, and {scheme.grid.name} has "
            f"{scheme.grid.levels} levels; the file is damaged."
        )
    zeros = None if scheme.symmetric else reader.tensor(f"{module}.zeros")
    return QuantizedTensor(codes, checked_scales(reader, f"{module}.scales"), scheme, zeros)
