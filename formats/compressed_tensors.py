"""The compressed-tensors layouts `pack-quantized` and `int-quantized`.

For a layer with K inputs, N outputs, groups of g and b bits, pack-quantized is

    weight_packed      int32 [N, ceil(K*b/32)]    codes as one dense bitstream along K
    weight_scale       [N, K/g] or [N, 1]
    weight_zero_point  int32 [ceil(N*b/32), K/g]  asymmetric only: the same stream along N
    weight_shape       int64 [2]                  N, K

and int-quantized (W8A8: int8 weights, activations quantized per token) is

    weight             int8 [N, K]                code - 128
    weight_scale       [N, 1]

A weight is (code - zero) * scale. Releases of the library up to 0.17 put ten 3-bit codes in a word
and leave two bits unused; later ones, and vLLM, keep 3 bits dense. Both are read, dense is written.
"""

import re
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint, Modules, checked_scales
from qexport.errors import CheckpointError
from qexport.formats.folder import FolderFormat, dense_linears, group_size_of
from qexport.formats.words import from_words, in_words, scale_dtype_of, words
from qexport.grid import (
    ASYMMETRIC,
    INT2,
    INT3,
    INT4,
    INT8,
    SYMMETRIC,
    UINT2,
    UINT3,
    UINT4,
    UINT8,
    Grid,
    Scheme,
)
from qexport.shards import Parts, ShardReader
from qexport.tensor import QuantizedTensor

__all__ = ["CompressedTensors", "IntQuantized"]

_PLAIN = r"(?:[\w.-]|\\\.|\.\*)*"
_PATTERN = re.compile(rf"\^?({_PLAIN})(?:\(((?:[\w.-]|\\\.|\|)*)\)({_PLAIN}))?(\$)?", re.ASCII)
_PADDED = 10  # 3-bit codes in a word of the old packing


class CompressedTensors(FolderFormat):
    """`pack-quantized`."""

    name = "compressed-tensors"
    stored_format = "pack-quantized"
    marker = ".weight_packed"
    grids: ClassVar[tuple[Grid, ...]] = (INT2, UINT2, INT3, UINT3, INT4, UINT4, INT8, UINT8)
    scale_dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def describes(self, quantization: dict[str, Any]) -> bool:
        method = quantization.get("quant_method")
        return method == "compressed-tensors" and quantization.get("format") == self.stored_format

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        inputs = shape[1]
        if scheme.grid.bits == 3 and inputs > _PADDED and words(inputs, 3) == -(-inputs // _PADDED):
            return f"{inputs} inputs of 3 bits take as many words padded as dense; readers differ"
        return None

    def parts(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Parts:
        out, inputs = shape
        width, groups = scheme.grid.bits, scheme.groups(inputs)
        parts: Parts = {
            f"{module}.weight_packed": (torch.int32, (out, words(inputs, width))),
            f"{module}.weight_scale": (scheme.scale_dtype, (out, groups)),
            f"{module}.weight_shape": (torch.int64, (2,)),
        }
        if scheme.grid.zeros:
            parts[f"{module}.weight_zero_point"] = (torch.int32, (words(out, width), groups))
        return parts

    def encode_parts(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        width = tensor.scheme.grid.bits
        parts = {
            f"{module}.weight_packed": in_words(tensor.codes, width),
            f"{module}.weight_scale": tensor.scales,
            f"{module}.weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
        }
        if tensor.zeros is not None:
            stream = in_words(tensor.zeros.t().contiguous(), width)
            parts[f"{module}.weight_zero_point"] = stream.t()
        return parts

    def quantization_config(self, modules: Modules, source: Checkpoint) -> dict[str, Any]:
        schemes = list(dict.fromkeys(scheme for scheme, _ in modules.values()))
        groups = {}
        for index, scheme in enumerate(schemes):
            named = [module for module, (its, _) in modules.items() if its == scheme]
            groups[f"group_{index}"] = {
                # "Linear" is what every reader has been tried with; names only where they differ
                "targets": ["Linear"] if len(schemes) == 1 else named,
                "weights": _weights(scheme),
                **self._activations(),
            }
        return {
            "quant_method": "compressed-tensors",
            "format": self.stored_format,
            "quantization_status": "compressed",
            "ignore": dense_linears(source),
            "config_groups": groups,
        }

    def _activations(self) -> dict[str, Any]:
        return {"input_activations": None, "output_activations": None}

    def modules(self, reader: ShardReader, quantization: dict[str, Any]) -> Modules:
        groups = quantization.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
            raise CheckpointError(f"{reader.folder}: config.json has no config_groups.")
        modules: Modules = {}
        for name in reader:
            if name.endswith(self.marker) and self._is_marked(reader, name):
                module = name.removesuffix(self.marker)
                modules[module] = self._scheme(reader, module, _group_of(reader, module, groups))
        return modules

    def _is_marked(self, reader: ShardReader, name: str) -> bool:
        return True

    def _scheme(
        self, reader: ShardReader, module: str, weights: dict[str, Any]
    ) -> tuple[Scheme, tuple[int, int]]:
        width = weights.get("num_bits")
        grids = SYMMETRIC if weights.get("symmetric", True) else ASYMMETRIC
        if type(width) is not int or width not in grids or weights.get("type", "int") != "int":
            raise CheckpointError(
                f"{reader.folder}: {module} has {width!r} bits of type "
                f"{weights.get('type')!r}; 2, 3, 4 and 8 bits of int are read."
            )
        if f"{module}.weight_g_idx" in reader:
            raise CheckpointError(
                f"{reader.folder}: {module} has reordered groups (actorder); quantize it again "
                "with actorder static or off."
            )
        out, inputs = self._shape(reader, module)
        groups = (*reader.shape(f"{module}.weight_scale"), 0, 0)[1]
        dtype = scale_dtype_of(reader, f"{module}.weight_scale")
        stated = weights.get("group_size") if weights.get("strategy") == "group" else -1
        group_size = group_size_of(reader, module, inputs, groups, stated)
        return Scheme(grids[width], group_size, dtype), (out, inputs)

    def _shape(self, reader: ShardReader, module: str) -> tuple[int, int]:
        name = f"{module}.weight_shape"
        if reader.shape(name) != (2,) or reader.dtype(name) not in (torch.int64, torch.int32):
            raise CheckpointError(f"{reader.folder}: {name} is not two whole numbers.")
        out, inputs = (int(side) for side in reader.tensor(name))
        if not (0 < out < 2**31 and 0 < inputs < 2**31):
            raise CheckpointError(f"{reader.folder}: {name} says [{out}, {inputs}].")
        return out, inputs

    def file_parts(
        self, reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> Parts:
        parts = self.parts(module, scheme, shape)
        name = f"{module}.weight_shape"
        if name in parts:
            parts[name] = (reader.dtype(name), (2,))
        if scheme.grid.bits == 3 and _is_padded(reader, module, shape):
            (out, inputs), groups = shape, scheme.groups(shape[1])
            padded = (torch.int32, (out, -(-inputs // _PADDED)))
            parts[f"{module}.weight_packed"] = padded
            if scheme.grid.zeros:
                name = f"{module}.weight_zero_point"
                parts[name] = (torch.int32, (-(-out // _PADDED), groups))
        return parts

    def decode(
        self, reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        width, (out, inputs) = scheme.grid.bits, shape
        take = _from_padded if width == 3 and _is_padded(reader, module, shape) else from_words
        codes = take(reader.tensor(f"{module}.weight_packed"), width, inputs)
        zeros = None
        if scheme.grid.zeros:
            stream = reader.tensor(f"{module}.weight_zero_point").t()
            zeros = take(stream, width, out).t().contiguous()
        scales = checked_scales(reader, f"{module}.weight_scale")
        return QuantizedTensor(codes, scales, scheme, zeros)


class IntQuantized(CompressedTensors):
    """`int-quantized`: int8 weights per channel, for engines that multiply int8 by int8."""

    name = "int-quantized"
    stored_format = "int-quantized"
    marker = ".weight_scale"
    grids = (INT8,)

    def refuses(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if scheme.group_size is not None and scheme.group_size != shape[1]:
            return f"int-quantized has one scale per channel, and this is g{scheme.group_size}"
        return None

    def parts(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Parts:
        return {
            f"{module}.weight": (torch.int8, shape),
            f"{module}.weight_scale": (scheme.scale_dtype, (shape[0], scheme.groups(shape[1]))),
        }

    def encode_parts(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        # code - 128 as int8 is the code's byte with its highest bit turned over
        return {
            f"{module}.weight": (tensor.codes ^ 0x80).view(torch.int8),
            f"{module}.weight_scale": tensor.scales,
        }

    def _scheme(
        self, reader: ShardReader, module: str, weights: dict[str, Any]
    ) -> tuple[Scheme, tuple[int, int]]:
        scheme, shape = super()._scheme(reader, module, weights)
        if scheme.grid != INT8:
            raise CheckpointError(
                f"{reader.folder}: {module} is {scheme.grid.name} held as int8; of int-quantized "
                "symmetric weights of 8 bits are read."
            )
        return scheme, shape

    def decode(
        self, reader: ShardReader, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        codes = reader.tensor(f"{module}.weight").view(torch.uint8) ^ 0x80
        return QuantizedTensor(codes, checked_scales(reader, f"{module}.weight_scale"), scheme)

    def _activations(self) -> dict[str, Any]:
        per_token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
        return {"input_activations": {**per_token, "dynamic": True}, "output_activations": None}

    def quantization_config(self, modules: Modules, source: Checkpoint) -> dict[str, Any]:
        per_channel = {
            module: (replace(scheme, group_size=None), shape)
            for module, (scheme, shape) in modules.items()  # one group is a channel
        }
        return super().quantization_config(per_channel, source)

    def _is_marked(self, reader: ShardReader, name: str) -> bool:
        weight = name.removesuffix(self.marker) + ".weight"
        return weight in reader and reader.dtype(weight) == torch.int8

    def _shape(self, reader: ShardReader, module: str) -> tuple[int, int]:
        shape = reader.shape(f"{module}.weight")
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{reader.folder}: {module}.weight is not a matrix.")
        return shape[0], shape[1]


def _weights(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.grid.bits,
        "type": "int",
        "symmetric": not scheme.grid.zeros,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }


def _group_of(reader: ShardReader, module: str, groups: dict[str, Any]) -> dict[str, Any]:
    """The `weights` of the group that a module belongs to: by name first, then by class."""
    by_class = None
    for group in groups.values():
        targets, weights = group.get("targets"), group.get("weights")
        if not isinstance(targets, list) or not isinstance(weights, dict):
            continue
        for target in map(str, targets):
            if target == module or (target.startswith("re:") and _matches(target[3:], module)):
                return weights
            if target == "Linear":
                by_class = weights
    if by_class is None:
        raise CheckpointError(f"{reader.folder}: no config_group has {module} among its targets.")
    return by_class


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern from a file fits the beginning of a module's name.

    Python's matcher may take exponential time over a stranger's pattern. What such configs use is
    matched here in the product of the lengths: letters, `.` and `\\.`, `.*`, one group `(a|b)`, and
    the anchors. Raises CheckpointError for anything else.
    """
    parts = _PATTERN.fullmatch(pattern)
    if parts is None or len(pattern) > 500:
        raise CheckpointError(
            f"the target pattern {pattern[:60]!r} has more than letters, '.', '.*' and one group "
            "of alternatives, which is all that is read of a regular expression."
        )
    before, inner, after, end = parts.groups(default="")
    return any(
        _fits([_letters(piece) for piece in (before + one + after).split(".*")], module, bool(end))
        for one in inner.split("|")
    )


def _letters(piece: str) -> list[str]:
    """The characters of a piece, `` for one that may be any."""
    return ["" if one == "." else one[-1] for one in re.findall(r"\\.|.", piece)]


def _fits(pieces: list[list[str]], text: str, whole: bool) -> bool:
    """Whether the pieces stand in the text in order, the first at its beginning."""
    at = 0
    for index, piece in enumerate(pieces):
        last = whole and index == len(pieces) - 1
        starts = [at] if index == 0 else range(at, len(text) - len(piece) + 1)
        if last:
            starts = [start for start in starts if start + len(piece) == len(text)]
        found = next((start for start in starts if _stands(piece, text, start)), None)
        if found is None:
            return False
        at = found + len(piece)
    return True


def _stands(piece: list[str], text: str, start: int) -> bool:
    there = text[start : start + len(piece)]
    return len(there) == len(piece) and all(
        mine in ("", theirs) for mine, theirs in zip(piece, there, strict=True)
    )


def _is_padded(reader: ShardReader, module: str, shape: tuple[int, int]) -> bool:
    """Whether 3-bit codes stand ten to a word. Raises CheckpointError where one cannot tell."""
    inputs = shape[1]
    stored = (*reader.shape(f"{module}.weight_packed"), 0, 0)[1]
    dense, padded = words(inputs, 3), -(-inputs // _PADDED)
    if dense == padded and inputs > _PADDED:
        raise CheckpointError(
            f"{reader.folder}: {module} has {inputs} inputs of 3 bits, which the padded and the "
            "dense packing keep in as many words; one cannot tell which it is."
        )
    return stored == padded


def _from_padded(packed: Tensor, width: int, count: int) -> Tensor:
    """3-bit codes, ten in the low 30 bits of each int32."""
    shifts = torch.arange(_PADDED, dtype=torch.int32) * width
    codes = (packed.contiguous().unsqueeze(-1) >> shifts) & 0b111
    return codes.to(torch.uint8).view(packed.shape[0], -1)[:, :count].contiguous()
