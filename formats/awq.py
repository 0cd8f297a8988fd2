"""The AWQ GEMM layout, 4 bits, as AutoAWQ writes it.

For a layer with K inputs, N outputs and groups of g:

    qweight  int32 [K, N/8]    8 outputs a word; nibble i holds output (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros   int32 [K/g, N/8]  zero points in the same order
    scales   [K/g, N]

A weight is (code - zero) * scale. Symmetric grids are written with zero point 8, since engines take
their fast path only where zero points are there.
"""

from typing import Any

import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint, Modules, checked_scales
from qexport.errors import CheckpointError
from qexport.formats.folder import FolderFormat, dense_linears, group_size_of, single_scheme
from qexport.formats.words import from_words, in_words, scale_dtype_of
from qexport.grid import UINT4, Scheme
from qexport.shards import Parts, ShardReader
from qexport.tensor import QuantizedTensor

__all__ = ["Awq"]

_LANES = 8
_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
_UNDO = torch.argsort(_ORDER)


class Awq(FolderFormat):
    """Version `gemm`."""

    name = "awq"
    grids = (UINT4,)
    scale_dtypes = (torch.float16,)

    def describes(self, quantization: dict[str, Any]) -> bool:
        version = str(quantization.get("version") or quantization.get("format") or "gemm")
        return quantization.get("quant_method") == "awq" and version.lower() == "gemm"

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if shape[0] % _LANES:
            return f"awq packs 8 outputs a word, and a layer has {shape[0]}"
        return None

    def parts(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Parts:
        out, inputs = shape
        groups = scheme.groups(inputs)
        return {
            f"{module}.qweight": (torch.int32, (inputs, out // _LANES)),
            f"{module}.qzeros": (torch.int32, (groups, out // _LANES)),
            f"{module}.scales": (scheme.scale_dtype, (groups, out)),
        }

    def encode_parts(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        assert tensor.zeros is not None
        return {
            f"{module}.qweight": _interleave(tensor.codes.t()),
            f"{module}.qzeros": _interleave(tensor.zeros.t()),
            f"{module}.scales": tensor.scales.t(),
        }

    def quantization_config(self, modules: Modules, source: Checkpoint) -> dict[str, Any]:
        scheme = single_scheme(self, modules)
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": scheme.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": dense_linears(source),
        }

    def modules(self, reader: ShardReader, quantization: dict[str, Any]) -> Modules:
        width = quantization.get("bits", quantization.get("w_bit"))
        if width != 4 or not quantization.get("zero_point", True):
            raise CheckpointError(
                f"{reader.folder}: config.json says {width!r} bits and zero_point "
                f"{quantization.get('zero_point', True)!r}; AWQ is read at 4 bits with zero points."
            )
        modules: Modules = {}
        for name in reader:
            if name.endswith(".qweight"):
                module = name.removesuffix(".qweight")
                stated = quantization.get("group_size", quantization.get("q_group_size"))
                modules[module] = _scheme(reader, module, stated)
        return modules

    def decode(
        self, reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        codes = _part(reader.tensor(f"{module}.qweight"), shape[0])
        zeros = _part(reader.tensor(f"{module}.qzeros"), shape[0])
        scales = checked_scales(reader, f"{module}.scales").t().contiguous()
        return QuantizedTensor(codes, scales, scheme, zeros)


def _scheme(reader: ShardReader, module: str, stated: object) -> tuple[Scheme, tuple[int, int]]:
    inputs, lanes = (*reader.shape(f"{module}.qweight"), 0, 0)[:2]
    groups = (*reader.shape(f"{module}.scales"), 0)[0]
    if not inputs or not lanes or not groups or inputs % groups:
        raise CheckpointError(
            f"{reader.folder}: {module} has qweight {reader.shape(f'{module}.qweight')} and "
            f"{groups} groups, which is no AWQ layer."
        )
    dtype = scale_dtype_of(reader, f"{module}.scales")
    group_size = group_size_of(reader, module, inputs, groups, stated)
    return Scheme(UINT4, group_size, dtype), (inputs, lanes * _LANES)[::-1]


def _interleave(codes: Tensor) -> Tensor:
    """uint8 [rows, N] as int32 [rows, N/8]."""
    rows, n = codes.shape
    return in_words(codes.reshape(rows, -1, _LANES)[:, :, _ORDER].reshape(rows, n), 4)


def _part(packed: Tensor, out: int) -> Tensor:
    """Undo `_interleave`, and transpose: int32 [rows, N/8] to uint8 [N, rows]."""
    codes = from_words(packed, 4, out).view(-1, out // _LANES, _LANES)[:, :, _UNDO]
    return codes.reshape(-1, out).t().contiguous()
