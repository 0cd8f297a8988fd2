"""bitsandbytes' NF4, as `from_pretrained` of transformers loads it.

Layout: `bitsandbytes/functional.py` (QuantState). Two codes share a byte, the first in the high
half; blocks of a matrix run over the ends of its rows, so that a group has to divide them. Scales
are float32 (`absmax`), or double-quantized: then they are codes in units of `nested_absmax`, by a
map that stands in the file, with an offset. vLLM has dropped its reader.
"""

import json
import math
from typing import Any

import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint, Modules, checked_scales, module_of
from qexport.double_quant import BLOCK, redoubled, undoubled
from qexport.errors import CheckpointError, RefusedError
from qexport.experts import expert_of
from qexport.formats.folder import FolderFormat, dense_linears
from qexport.grid import NF4, Scheme
from qexport.shards import Parts, ShardReader
from qexport.tensor import QuantizedTensor

__all__ = ["BitsAndBytes"]

_STATE = ".weight.quant_state.bitsandbytes__nf4"
_GROUPS = (64, 128, 256, 512, 1024, 2048, 4096)  # that its kernels are made for


class BitsAndBytes(FolderFormat):
    """`<module>.weight` uint8 [out * in / 2, 1], and tensors of its state."""

    name = "bitsandbytes"
    grids = (NF4,)
    scale_dtypes = (torch.float32,)
    tells_shares = True

    def describes(self, quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") == "bitsandbytes"

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if scheme.group_size not in _GROUPS:
            this = "not one scale per channel"
            if scheme.group_size is not None:
                this = f"and this is g{scheme.group_size}"
            return f"bitsandbytes has groups of 64 to 4096, powers of two, {this}"
        return None

    def parts(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Parts:
        weights = math.prod(shape)
        groups = shape[0] * scheme.groups(shape[1])
        weight = f"{module}.weight"
        parts: Parts = {
            weight: (torch.uint8, (weights // 2, 1)),
            f"{weight}.absmax": (torch.float32, (groups,)),
            f"{weight}.quant_map": (torch.float32, (NF4.levels,)),
            f"{module}{_STATE}": (torch.uint8, (len(_state(scheme, shape)),)),
        }
        if scheme.double_quant:
            parts[f"{weight}.absmax"] = (torch.uint8, (groups,))
            parts[f"{weight}.nested_absmax"] = (torch.float32, (-(-groups // BLOCK),))
            parts[f"{weight}.nested_quant_map"] = (torch.float32, (256,))
        return parts

    def file_parts(
        self, reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> Parts:
        """Others write their JSON otherwise, and read here as float32 what they have doubled."""
        weight, parts = f"{module}.weight", self.parts(module, scheme, shape)
        parts[f"{module}{_STATE}"] = (torch.uint8, reader.shape(f"{module}{_STATE}"))
        if not scheme.double_quant and f"{weight}.nested_absmax" in reader:
            groups = shape[0] * scheme.groups(shape[1])
            size = _read_state(reader, module).get("nested_blocksize")
            if type(size) is not int or not 0 < size < 2**31:
                raise _damaged(reader, module, "its nested_blocksize")
            parts[f"{weight}.absmax"] = (torch.uint8, (groups,))
            parts[f"{weight}.nested_absmax"] = (torch.float32, (-(-groups // size),))
            parts[f"{weight}.nested_quant_map"] = (torch.float32, (256,))
        return parts

    def encode_parts(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        pairs = tensor.codes.reshape(-1, 2)
        weight = f"{module}.weight"
        parts = {
            weight: (pairs[:, :1] << 4 | pairs[:, 1:]).contiguous(),
            f"{weight}.absmax": tensor.scales.flatten(),
            f"{weight}.quant_map": torch.tensor(NF4.values),
            f"{module}{_STATE}": _bytes(_state(tensor.scheme, tensor.shape)),
        }
        if tensor.scheme.double_quant:
            codes, largest = undoubled(tensor.scales)
            parts[f"{weight}.absmax"] = codes.flatten()
            parts[f"{weight}.nested_absmax"] = largest
            parts[f"{weight}.nested_quant_map"] = _linear_map()
        return parts

    def decode(
        self, reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        weight = f"{module}.weight"
        if not torch.equal(reader.tensor(f"{weight}.quant_map"), torch.tensor(NF4.values)):
            raise _damaged(reader, module, "a quant_map that is not NF4's")
        packed = reader.tensor(weight)
        codes = torch.cat((packed >> 4, packed & 15), dim=1).view(shape)
        groups = (shape[0], scheme.groups(shape[1]))
        if f"{weight}.nested_absmax" in reader:
            scales = _nested(reader, module, doubled=scheme.double_quant)
        else:
            scales = checked_scales(reader, f"{weight}.absmax")
        return QuantizedTensor(codes, scales.view(groups), scheme)

    def quantization_config(self, modules: Modules, source: Checkpoint) -> dict[str, Any]:
        if any(map(expert_of, modules)):
            raise RefusedError(
                "bitsandbytes has no place for experts: transformers fuses them, and takes linear "
                "layers alone; native holds them."
            )
        double = any(scheme.double_quant for scheme, _ in modules.values())
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": dense_linears(source),
            "llm_int8_threshold": 6.0,
        }

    def modules(self, reader: ShardReader, quantization: dict[str, Any]) -> Modules:
        if not quantization.get("load_in_4bit") or quantization.get("bnb_4bit_quant_type") != "nf4":
            raise CheckpointError(
                f"{reader.folder}: of bitsandbytes' types, nf4 alone is read; fp4 and int8 are not."
            )
        modules: Modules = {}
        for name in reader:
            if name.endswith(_STATE):
                module = module_of(name.removesuffix(_STATE))
                modules[module] = _scheme_of(reader, module)
        return modules


def _state(scheme: Scheme, shape: tuple[int, int]) -> bytes:
    """What QuantState packs as JSON. The scales are the same whatever dtype weights are made in."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": scheme.group_size,
        "dtype": "bfloat16",
        "shape": list(shape),
    }
    if scheme.double_quant:
        state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": 0.0}
    return json.dumps(state).encode()


def _linear_map() -> Tensor:
    """Of `double_quant`: code c is (c + 1) / 256 of the largest."""
    return torch.arange(1, 257) / 256


def _read_state(reader: ShardReader, module: str) -> dict[str, Any]:
    """The JSON of a module, whoever wrote it; its shape and group are sound."""
    try:
        state = json.loads(bytes(reader.tensor(f"{module}{_STATE}").tolist()))
        out, inputs = state["shape"]
        group = state["blocksize"]
        sound = all(type(n) is int and 0 < n < 2**31 for n in (out, inputs, group))
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound or state.get("quant_type") != "nf4":
        raise _damaged(reader, module, "the state")
    if inputs % group:
        raise CheckpointError(
            f"{reader.folder}: blocks of {group} run over the ends of {module}'s rows of {inputs}, "
            "which is not read."
        )
    found: dict[str, Any] = state
    return found


def _scheme_of(reader: ShardReader, module: str) -> tuple[Scheme, tuple[int, int]]:
    """Ours where scales are doubled as ours are; other doubled ones are float32 here."""
    state = _read_state(reader, module)
    nested = f"{module}.weight.nested_quant_map"
    double = (
        nested in reader
        and reader.dtype(nested) == torch.float32
        and (state.get("nested_blocksize"), state.get("nested_offset")) == (BLOCK, 0.0)
        and torch.equal(reader.tensor(nested), _linear_map())
    )
    out, inputs = state["shape"]
    return Scheme(NF4, state["blocksize"], torch.float32, None, double), (out, inputs)


def _nested(reader: ShardReader, module: str, *, doubled: bool) -> Tensor:
    """Scales float32 of doubled ones, by the map and offset that the file has."""
    weight = f"{module}.weight"
    codes = reader.tensor(f"{weight}.absmax")
    largest = checked_scales(reader, f"{weight}.nested_absmax")
    if doubled:
        return redoubled(codes, largest)
    state = _read_state(reader, module)
    spread = largest[torch.arange(codes.numel()) // state["nested_blocksize"]]
    offset = state.get("nested_offset")
    scales = reader.tensor(f"{weight}.nested_quant_map")[codes.int()] * spread
    if not isinstance(offset, float) or not math.isfinite(offset):
        raise _damaged(reader, module, "its nested_offset")
    scales += offset
    if not bool((scales.isfinite() & (scales != 0)).all()):
        raise _damaged(reader, module, "a scale")
    return scales


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _damaged(reader: ShardReader, module: str, what: str) -> CheckpointError:
    return CheckpointError(f"{reader.folder}: {what} of {module} is not what bitsandbytes writes.")
