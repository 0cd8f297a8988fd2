"""The native layout: any grid, half-integer zero points included, at its own width. See SPEC.md."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qexport import bits
from qexport.checkpoint import (
    CONFIG_VERSION,
    Checkpoint,
    Modules,
    check_codes,
    check_scales,
    check_zeros,
    checked_minima,
    checked_scales,
    modules_from_json,
    modules_to_json,
)
from qexport.double_quant import BLOCK, doubled, redoubled, undoubled
from qexport.errors import CheckpointError
from qexport.formats.folder import FolderFormat
from qexport.grid import GRIDS, Scheme
from qexport.shards import Parts, ShardReader
from qexport.tensor import QuantizedTensor

__all__ = ["Native", "decoded"]


class Native(FolderFormat):
    """`<module>.qweight` uint8 [out, ceil(in*bits/8)], `<module>.scales` [out, groups] and more."""

    name = "native"
    grids = tuple(sorted(GRIDS.values(), key=lambda grid: grid.bits))
    scale_dtypes = (torch.float16, torch.bfloat16, torch.float32)
    tells_shares = True

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
        if scheme.double_quant:
            parts[f"{module}.scales"] = (torch.uint8, groups)
            blocks = -(-groups[0] * groups[1] // BLOCK)
            parts[f"{module}.scales_largest"] = (torch.float32, (blocks,))
        if scheme.grid.zeros:
            parts[f"{module}.zeros"] = (torch.uint8, groups)
        if scheme.grid.minima:
            parts[f"{module}.minima"] = (torch.float32, groups)
        return parts

    def encode_parts(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        parts = {
            f"{module}.qweight": bits.pack(tensor.codes, tensor.scheme.grid.bits),
            f"{module}.scales": tensor.scales,
        }
        if tensor.scheme.double_quant:
            codes, largest = undoubled(tensor.scales)
            parts |= {f"{module}.scales": codes, f"{module}.scales_largest": largest}
        if tensor.zeros is not None:
            parts[f"{module}.zeros"] = tensor.zeros
        if tensor.minima is not None:
            parts[f"{module}.minima"] = tensor.minima
        return parts

    def decode(
        self, reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        parts = {name: reader.tensor(name) for name in self.parts(module, scheme, shape)}
        checked_scales(reader, f"{module}.scales{'_largest' if scheme.double_quant else ''}")
        if scheme.grid.minima:
            checked_minima(reader, f"{module}.minima")
        found = decoded(module, parts, scheme, shape[1])
        check_tensor(found, f"{reader.folder}: {module}")
        return found

    def quantization_config(self, modules: Modules, source: Checkpoint) -> dict[str, Any]:
        return {
            "quant_method": "qexport",
            "format": "native",
            "version": CONFIG_VERSION,
            "config_groups": modules_to_json(modules),
        }

    def modules(self, reader: ShardReader, quantization: dict[str, Any]) -> Modules:
        return modules_from_json(quantization)


def check_tensor(found: QuantizedTensor, where: str) -> None:
    """Raise CheckpointError for values that the specification does not allow."""
    check_scales(found.scales, where)
    if found.scheme.double_quant and not torch.equal(doubled(found.scales), found.scales):
        raise CheckpointError(f"{where} has scales that are not those of a double quantization.")
    check_codes(found.codes, found.scheme.grid, where)
    if found.zeros is not None:
        check_zeros(found.zeros, found.scheme.grid, where)


def decoded(
    module: str, parts: Mapping[str, Tensor], scheme: Scheme, inputs: int
) -> QuantizedTensor:
    """The matrix [out, inputs] of a module whose tensors are `parts`, those of `Native.parts`."""
    scales = parts[f"{module}.scales"]
    if scheme.double_quant:
        scales = redoubled(scales, parts[f"{module}.scales_largest"])
    codes = bits.unpack(parts[f"{module}.qweight"], scheme.grid.bits, inputs)
    zeros, minima = parts.get(f"{module}.zeros"), parts.get(f"{module}.minima")
    return QuantizedTensor(codes, scales, scheme, zeros, minima)
