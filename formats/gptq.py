"""The GPTQ layout, versions 1 and 2, as AutoGPTQ and GPTQModel write it.

For a layer with K inputs, N outputs, groups of g and b bits (2, 3, 4 or 8):

    qweight  int32 [K*b/32, N]          codes as one dense bitstream along K
    qzeros   int32 [ceil(K/g), N*b/32]  zero points, the same stream along N
    scales   [ceil(K/g), N]
    g_idx    int32 [K]                  the group of each input, here i // g

A weight is (code - zero) * scale. Version 1 (`gptq`) stores zero - 1 modulo 2**b, version 2
(`gptq_v2`) stores zero.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qexport import bits
from qexport.checkpoint import Checkpoint, Entry, Modules, checked_scales, dense_entry, expect
from qexport.errors import CheckpointError, RefusedError
from qexport.formats.base import Format
from qexport.grid import INT2, INT3, INT4, INT8, UINT2, UINT3, UINT4, UINT8, Scheme
from qexport.shards import ShardReader
from qexport.tensor import QuantizedTensor
from qexport.version import __version__

__all__ = ["Gptq", "GptqV2"]

_WORD = 32
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_SYMMETRIC = {2: INT2, 3: INT3, 4: INT4, 8: INT8}
_ASYMMETRIC = {2: UINT2, 3: UINT3, 4: UINT4, 8: UINT8}


class Gptq(Format):
    """Version 1, the one that every engine reads."""

    name = "gptq"
    grids = (INT2, UINT2, INT3, UINT3, INT4, UINT4, INT8, UINT8)
    scale_dtypes = (torch.float16,)
    zero_offset = 1

    def detect(self, quantization: dict[str, Any]) -> bool:
        if quantization.get("quant_method") != "gptq":
            return False
        version = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
        return bool(version == self.name)

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        for size, what in ((shape[1], "inputs"), (shape[0], "outputs")):
            if size % _WORD:
                return f"{self.name} packs whole words of 32, and a layer has {size} {what}"
        return None

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        width = tensor.scheme.grid.bits
        out, inputs = tensor.shape
        groups = tensor.scales.shape[1]
        if tensor.zeros is None:
            assert tensor.scheme.grid.zero is not None
            zeros = torch.full((groups, out), int(tensor.scheme.grid.zero), dtype=torch.uint8)
        else:
            zeros = tensor.zeros.t()
        stored = (zeros.to(torch.int16) - self.zero_offset) % (1 << width)
        return {
            f"{module}.qweight": _words(bits.pack(tensor.codes, width)).t().contiguous(),
            f"{module}.qzeros": _words(bits.pack(stored.to(torch.uint8).contiguous(), width)),
            f"{module}.scales": tensor.scales.t().contiguous(),
            f"{module}.g_idx": _group_index(inputs, groups),
        }

    def quantization_config(self, modules: Modules) -> dict[str, Any]:
        schemes = {scheme for scheme, _ in modules.values()}
        if len(schemes) != 1:
            raise RefusedError(
                f"{self.name} is written with one width and group size for the whole model, and "
                f"this run has {len(schemes)} schemes; native holds them."
            )
        scheme = schemes.pop()
        return {
            "quant_method": "gptq",
            "method": "gptq",
            "format": self.name,
            "checkpoint_format": self.name,
            "bits": scheme.grid.bits,
            "group_size": scheme.group_size or -1,
            "sym": scheme.symmetric,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "dynamic": {},
            "meta": {"quantizer": [f"qexport:{__version__}"]},
        }

    def extra_files(self, quantization: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {"quantize_config.json": quantization}

    def read(self, reader: ShardReader, config: dict[str, Any]) -> Checkpoint:
        quantization = config["quantization_config"]
        symmetric = bool(quantization.get("sym", True))
        stated, dynamic = quantization.get("bits"), quantization.get("dynamic")
        modules = [name.removesuffix(".qweight") for name in reader if name.endswith(".qweight")]
        parts = {f"{module}.{part}" for module in modules for part in _PARTS}
        entries = {name: dense_entry(reader, name) for name in reader if name not in parts}
        for module in modules:
            scheme, shape = _scheme(reader, module, symmetric)
            if not dynamic and scheme.grid.bits != stated:
                raise CheckpointError(
                    f"{reader.folder}: config.json says {stated!r} bits, and {module} has "
                    f"{scheme.grid.bits}."
                )
            load = partial(self._load, reader, module, scheme, shape)
            entries[f"{module}.weight"] = Entry(shape, scheme.scale_dtype, load, scheme)
        return Checkpoint(reader.folder, self.name, config, entries)

    def _load(
        self, reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        width, (out, inputs) = scheme.grid.bits, shape
        scales = checked_scales(reader, f"{module}.scales").t().contiguous()
        index = reader.tensor(f"{module}.g_idx")
        if not torch.equal(index, _group_index(inputs, scales.shape[1])):
            raise CheckpointError(
                f"{reader.folder}: {module} has reordered groups (desc_act); quantize it again "
                "with desc_act off, or with static groups."
            )
        codes = bits.unpack(_bytes(reader.tensor(f"{module}.qweight").t()), width, inputs)
        stored = bits.unpack(_bytes(reader.tensor(f"{module}.qzeros")), width, out)
        zeros = (stored.to(torch.int16) + self.zero_offset) % (1 << width)
        zeros = zeros.to(torch.uint8).t().contiguous()
        if not scheme.symmetric:
            return QuantizedTensor(codes, scales, scheme, zeros)
        if bool(torch.ne(zeros, scheme.grid.zero or 0).any()):
            raise CheckpointError(
                f"{reader.folder}: {module} has zero point {int(zeros.flatten()[0])} where "
                f"symmetric {width}-bit {self.name} has {scheme.grid.zero:.0f}; its config names "
                "the wrong version (gptq or gptq_v2) or the wrong symmetry."
            )
        return QuantizedTensor(codes, scales, scheme)


class GptqV2(Gptq):
    """Version 2: zero points as they are."""

    name = "gptq_v2"
    zero_offset = 0


def _scheme(reader: ShardReader, module: str, symmetric: bool) -> tuple[Scheme, tuple[int, int]]:
    """Width, group size and shape from the tensors, which outvote a config's `dynamic` rules."""
    inputs = (*reader.shape(f"{module}.g_idx"), 0)[0]
    rows, out = (*reader.shape(f"{module}.qweight"), 0, 0)[:2]
    groups = (*reader.shape(f"{module}.scales"), 0)[0]
    width = rows * _WORD // inputs if inputs else 0
    grids = _SYMMETRIC if symmetric else _ASYMMETRIC
    if width not in grids or not groups or inputs % groups or inputs % _WORD or out % _WORD:
        raise CheckpointError(
            f"{reader.folder}: {module} has qweight {reader.shape(f'{module}.qweight')}, g_idx of "
            f"{inputs} and {groups} groups, which is no GPTQ layer of 2, 3, 4 or 8 bits."
        )
    dtype = reader.dtype(f"{module}.scales")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise CheckpointError(f"{reader.folder}: {module}.scales has dtype {dtype}.")
    expect(reader, f"{module}.qweight", torch.int32, (inputs * width // _WORD, out))
    expect(reader, f"{module}.qzeros", torch.int32, (groups, out * width // _WORD))
    expect(reader, f"{module}.scales", dtype, (groups, out))
    expect(reader, f"{module}.g_idx", torch.int32, (inputs,))
    group_size = None if groups == 1 else inputs // groups
    return Scheme(grids[width], group_size, dtype), (out, inputs)


def _group_index(inputs: int, groups: int) -> Tensor:
    return torch.arange(inputs, dtype=torch.int32) // (inputs // groups)


def _words(packed: Tensor) -> Tensor:
    """uint8 [rows, 4n] as little-endian int32 [rows, n]."""
    return packed.view(torch.int32)


def _bytes(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.uint8)
