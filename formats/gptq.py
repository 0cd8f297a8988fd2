"""The GPTQ layout, versions 1 and 2, as AutoGPTQ and GPTQModel write it.

For a layer with K inputs, N outputs, groups of g and b bits (2, 3, 4 or 8):

    qweight  int32 [K*b/32, N]          codes as one dense bitstream along K
    qzeros   int32 [ceil(K/g), N*b/32]  zero points, the same stream along N
    scales   [ceil(K/g), N]
    g_idx    int32 [K]                  the group of each input, here i // g

A weight is (code - zero) * scale. Version 1 (`gptq`) stores zero - 1 modulo 2**b, version 2
(`gptq_v2`) stores zero.
"""

import re
from typing import Any

import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint, Modules, checked_scales
from qexport.errors import CheckpointError, RefusedError
from qexport.formats.folder import FolderFormat, dense_linears, group_size_of, single_scheme
from qexport.formats.words import WORD, from_words, in_words, scale_dtype_of
from qexport.grid import ASYMMETRIC, SYMMETRIC, Scheme
from qexport.shards import Parts, ShardReader
from qexport.tensor import QuantizedTensor
from qexport.version import __version__

__all__ = ["Gptq", "GptqV2"]


class Gptq(FolderFormat):
    """Version 1, the one that every engine reads."""

    name = "gptq"
    grids = tuple(table[width] for width in SYMMETRIC for table in (SYMMETRIC, ASYMMETRIC))
    scale_dtypes = (torch.float16,)
    zero_offset = 1

    def describes(self, quantization: dict[str, Any]) -> bool:
        if quantization.get("quant_method") != "gptq":
            return False
        version = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
        return bool(version == self.name)

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        for size, what in ((shape[1], "inputs"), (shape[0], "outputs")):
            if size % WORD:
                return f"{self.name} packs whole words of 32, and a layer has {size} {what}"
        return None

    def parts(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Parts:
        out, inputs = shape
        width, groups = scheme.grid.bits, scheme.groups(inputs)
        return {
            f"{module}.qweight": (torch.int32, (inputs * width // WORD, out)),
            f"{module}.qzeros": (torch.int32, (groups, out * width // WORD)),
            f"{module}.scales": (scheme.scale_dtype, (groups, out)),
            f"{module}.g_idx": (torch.int32, (inputs,)),
        }

    def encode_parts(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        width = tensor.scheme.grid.bits
        out, inputs = tensor.shape
        groups = tensor.scales.shape[1]
        if tensor.zeros is None:
            zeros = torch.full((groups, out), int(tensor.scheme.grid.middle), dtype=torch.uint8)
        else:
            zeros = tensor.zeros.t()
        if self.zero_offset and bool((zeros == 0).any()):
            others = "gptq_v2 and awq hold" if width == 4 else "gptq_v2 holds"
            raise RefusedError(
                f"{module} has zero points of 0, which version 1 wraps around and engines "
                f"carry into the next one; {others} them."
            )
        stored = (zeros.to(torch.int16) - self.zero_offset) % (1 << width)
        return {
            f"{module}.qweight": in_words(tensor.codes, width).t(),
            f"{module}.qzeros": in_words(stored.to(torch.uint8).contiguous(), width),
            f"{module}.scales": tensor.scales.t(),
            f"{module}.g_idx": _group_index(inputs, groups),
        }

    def quantization_config(self, modules: Modules, source: Checkpoint) -> dict[str, Any]:
        scheme = single_scheme(self, modules)
        dense = dense_linears(source)
        return {
            "quant_method": "gptq",
            "method": "gptq",
            "format": self.name,
            "checkpoint_format": self.name,
            "bits": scheme.grid.bits,
            "group_size": scheme.group_size or -1,
            "sym": not scheme.grid.zeros,
            "desc_act": False,
            "lm_head": "lm_head" in modules,
            "pack_dtype": "int32",
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in dense if name != "lm_head"},
            "meta": {"quantizer": [f"qexport:{__version__}"]},
        }

    def side_files(self, quantization: dict[str, Any]) -> dict[str, Any]:
        return {"quantize_config.json": quantization}

    def modules(self, reader: ShardReader, quantization: dict[str, Any]) -> Modules:
        symmetric = bool(quantization.get("sym", True))
        stated, rules = quantization.get("bits"), quantization.get("dynamic") or {}
        if not isinstance(rules, dict):
            raise CheckpointError(f"{reader.folder}: config.json's dynamic is no object of rules.")
        mixed = any(not str(rule).startswith("-") for rule in rules)  # others leave layers dense
        modules: Modules = {}
        for name in reader:
            if not name.endswith(".qweight"):
                continue
            module = name.removesuffix(".qweight")
            size = None if mixed else quantization.get("group_size")
            scheme, shape = _scheme(reader, module, symmetric, size)
            if not mixed and scheme.grid.bits != stated:
                raise CheckpointError(
                    f"{reader.folder}: config.json says {stated!r} bits, and {module} has "
                    f"{scheme.grid.bits}."
                )
            modules[module] = scheme, shape
        return modules

    def decode(
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
        codes = from_words(reader.tensor(f"{module}.qweight").t(), width, inputs)
        stored = from_words(reader.tensor(f"{module}.qzeros"), width, out)
        zeros = (stored.to(torch.int16) + self.zero_offset) % (1 << width)
        zeros = zeros.to(torch.uint8).t().contiguous()
        if scheme.grid.zeros:
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


def _scheme(
    reader: ShardReader, module: str, symmetric: bool, stated: object
) -> tuple[Scheme, tuple[int, int]]:
    """Width, group size and shape from the tensors, which outvote a config's `dynamic` rules."""
    inputs = (*reader.shape(f"{module}.g_idx"), 0)[0]
    rows, out = (*reader.shape(f"{module}.qweight"), 0, 0)[:2]
    groups = (*reader.shape(f"{module}.scales"), 0)[0]
    width = rows * WORD // inputs if inputs else 0
    grids = SYMMETRIC if symmetric else ASYMMETRIC
    if width not in grids or not groups or inputs % groups or inputs % WORD or out % WORD:
        raise CheckpointError(
            f"{reader.folder}: {module} has qweight {reader.shape(f'{module}.qweight')}, g_idx of "
            f"{inputs} and {groups} groups, which is no GPTQ layer of 2, 3, 4 or 8 bits."
        )
    dtype = scale_dtype_of(reader, f"{module}.scales")
    group_size = group_size_of(reader, module, inputs, groups, stated)
    return Scheme(grids[width], group_size, dtype), (out, inputs)


def _group_index(inputs: int, groups: int) -> Tensor:
    return torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
