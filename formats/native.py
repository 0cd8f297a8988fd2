"""The native layout: any grid, half-integer zero points included, at its own width. See SPEC.md."""

from typing import Any

import torch
from torch import Tensor

from qexport import bits
from qexport.checkpoint import (
    CONFIG_VERSION,
    Checkpoint,
    Modules,
    checked_scales,
    modules_from_json,
    modules_to_json,
)
from qexport.errors import CheckpointError
from qexport.formats.folder import FolderFormat
from qexport.grid import GRIDS, Scheme
from qexport.shards import Parts, ShardReader
from qexport.tensor import QuantizedTensor

__all__ = ["Native"]


class Native(FolderFormat):
    """`<module>.qweight` uint8 [out, ceil(in*bits/8)], `<module>.scales` [out, groups]."""

    name = "native"
    grids = tuple(sorted(GRIDS.values(), key=lambda grid: grid.bits))
    scale_dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def describes(self, quantization: dict[str, Any]) -> bool:
        form = quantization.get("format")
        return quantization.get("quant_method") == "qexport" and form == "native"

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return None

    def parts(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Parts:
        out, inputs = shape
        groups = (out, scheme.groups(inputs))
        row = bits.packed_bytes(inputs, scheme.grid.bits)
        parts: Parts = {
            f"{module}.qweight": (torch.uint8, (out, row)),
            f"{module}.scales": (scheme.scale_dtype, groups),
        }
        if not scheme.symmetric:
            parts[f"{module}.zeros"] = (torch.uint8, groups)
        return parts

    def encode_parts(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        parts = {
            f"{module}.qweight": bits.pack(tensor.codes, tensor.scheme.grid.bits),
            f"{module}.scales": tensor.scales,
        }
        if tensor.zeros is not None:
            parts[f"{module}.zeros"] = tensor.zeros
        return parts

    def decode(
        self, reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        codes = bits.unpack(reader.tensor(f"{module}.qweight"), scheme.grid.bits, shape[1])
        if int(codes.max()) >= scheme.grid.levels:
            raise CheckpointError(
                f"{reader.folder}: {module} holds code {int(codes.max())}, and {scheme.grid.name} "
                f"has {scheme.grid.levels} levels; the file is damaged."
            )
        zeros = None if scheme.symmetric else reader.tensor(f"{module}.zeros")
        return QuantizedTensor(codes, checked_scales(reader, f"{module}.scales"), scheme, zeros)

    def quantization_config(self, modules: Modules, source: Checkpoint) -> dict[str, Any]:
        return {
            "quant_method": "qexport",
            "format": "native",
            "version": CONFIG_VERSION,
            "config_groups": modules_to_json(modules),
        }

    def modules(self, reader: ShardReader, quantization: dict[str, Any]) -> Modules:
        return modules_from_json(quantization)
