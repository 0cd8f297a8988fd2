"""The GGUF container, version 3: typed metadata, tensor infos, then aligned data.

    "GGUF", uint32 version, uint64 tensors, uint64 pairs
    pairs of: string key, uint32 type, value
    infos of: string name, uint32 dimensions, uint64[] sides (inputs first), uint32 type,
              uint64 offset
    padding to the alignment, then tensor data; offsets count from here

Strings are a uint64 length and UTF-8; arrays a uint32 element type, a uint64 count and elements. A
file is somebody else's: every length is compared with what the file has left before it is used,
and strings are made only when they are asked for.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import CheckpointError
from qexport.stream import FilePlan

__all__ = ["GgufFile", "TensorInfo", "Value", "plan_file"]

_MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32
_MOST_ITEMS = 1 << 16  # pairs, and tensors
_MOST_STRINGS = 1 << 21  # of all arrays together; the largest vocabulary known has 2**18
_LONGEST_NAME = 1 << 10
_SCALARS = {
    "u8": (0, "<B"),
    "i8": (1, "<b"),
    "u16": (2, "<H"),
    "i16": (3, "<h"),
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
    "u64": (10, "<Q"),
    "i64": (11, "<q"),
    "f64": (12, "<d"),
}
_STRING, _ARRAY = 8, 9
_CODES = {code: (name, struct.Struct(form)) for name, (code, form) in _SCALARS.items()}


@dataclass(frozen=True)
class Value:
    """A typed metadata value. `kind` is `u32`, `f32`, `str`, … or `[str]` for an array."""

    kind: str
    value: Any

    def encode(self) -> bytes:
        """The bytes of type and value."""
        if not self.kind.startswith("["):
            return struct.pack("<I", _code(self.kind)) + _payload(self.kind, self.value)
        kind = self.kind[1:-1]
        head = struct.pack("<IIQ", _ARRAY, _code(kind), len(self.value))
        return head + b"".join(_payload(kind, item) for item in self.value)


def _code(kind: str) -> int:
    return _STRING if kind == "str" else _SCALARS[kind][0]


def _payload(kind: str, value: Any) -> bytes:
    if kind == "str":
        return _string(value)
    return struct.pack(_SCALARS[kind][1], value)


def _string(text: str) -> bytes:
    data = text.encode(errors="replace")
    return struct.pack("<Q", len(data)) + data


def plan_file(
    name: str,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, tuple[int, tuple[int, ...], int]],
) -> FilePlan:
    """Place tensors, given as (type, shape row-major, bytes) by name, in a file of that name."""
    head = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _string(key) + value.encode()
    places: dict[str, tuple[int, int]] = {}
    offset = 0
    for tensor, (kind, shape, size) in tensors.items():
        head += _string(tensor) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, offset)
        places[tensor] = (offset, size)
        offset += size + -size % _ALIGNMENT
    head += bytes(-len(head) % _ALIGNMENT)
    slots = {tensor: (len(head) + at, size) for tensor, (at, size) in places.items()}
    return FilePlan(name, bytes(head), slots, len(head) + offset)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: its type's number, shape row-major, and place in bytes."""

    type: int
    shape: tuple[int, ...]
    offset: int


class GgufFile:
    """The header of a file, checked. Raises CheckpointError where it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        if self.size < 24:
            raise self.damaged("it is too short for a header")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(self, data)
            counts = self._read_counts(cursor)
            self._raw = self._read_pairs(cursor, counts[1])
            self.tensors = self._read_infos(cursor, counts[0])
        offsets = sorted({info.offset for info in self.tensors.values()})
        if len(offsets) != len(self.tensors):
            raise self.damaged("two tensors stand at one place")
        self._ends = dict(zip(offsets, [*offsets[1:], self.size], strict=True))

    def __contains__(self, key: object) -> bool:
        return key in self._raw

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def raw(self, key: str) -> bytes:
        """The bytes of a value, its type before it; empty where the file has no such key."""
        return self._raw.get(key, b"")

    def text(self, key: str, default: str | None = None) -> str:
        return self._typed(key, (str,), default)  # type: ignore[no-any-return]

    def integer(self, key: str, default: int | None = None) -> int:
        return self._typed(key, (int,), default)  # type: ignore[no-any-return]

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._typed(key, (int, float), default))

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._typed(key, (bool,), default)  # type: ignore[no-any-return]

    def strings(self, key: str) -> list[str]:
        return self._typed(key, (list,), None)  # type: ignore[no-any-return]

    def numbers(self, key: str) -> NDArray[Any]:
        return self._typed(key, (np.ndarray,), None)  # type: ignore[no-any-return]

    def data(self, name: str, size: int) -> NDArray[np.uint8]:
        """`size` bytes of a tensor, mapped; what one writes into them stays in memory."""
        info = self.tensors[name]
        if size > self.size - info.offset:
            raise self.damaged(f"{name} wants {size} bytes and the file ends before")
        if size > self._ends[info.offset] - info.offset:
            raise self.damaged(f"{name} overlaps the tensor after it")
        return np.memmap(self.path, np.uint8, "c", info.offset, size)

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is no sound GGUF file: {why}; fetch it again.")

    def _typed(self, key: str, types: tuple[type, ...], default: Any) -> Any:
        if key not in self._raw:
            if default is None:
                raise self.damaged(f"it lacks {key}")
            return default
        value = _decode(self._raw[key])
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise self.damaged(f"{key} is of another type")
        return value

    def _read_counts(self, cursor: "_Cursor") -> tuple[int, int]:
        if cursor.take(4) != _MAGIC:
            raise self.damaged("it does not begin with GGUF")
        version, tensors, pairs = struct.unpack("<IQQ", cursor.take(20))
        if version not in (2, _VERSION):
            raise self.damaged(f"its version is {version}, and 2 and 3 are read")
        if max(tensors, pairs) > _MOST_ITEMS:
            raise self.damaged(f"it claims {tensors} tensors and {pairs} metadata pairs")
        return tensors, pairs

    def _read_pairs(self, cursor: "_Cursor", count: int) -> dict[str, bytes]:
        pairs: dict[str, bytes] = {}
        for _ in range(count):
            key = cursor.string(_LONGEST_NAME)
            if key in pairs:
                raise self.damaged(f"it has {key} twice")
            start = cursor.at
            cursor.skip_value()
            pairs[key] = cursor.data[start : cursor.at]
        return pairs

    def _read_infos(self, cursor: "_Cursor", count: int) -> dict[str, TensorInfo]:
        infos = []
        for _ in range(count):
            name = cursor.string(_LONGEST_NAME)
            (dimensions,) = struct.unpack("<I", cursor.take(4))
            if not 1 <= dimensions <= 4:
                raise self.damaged(f"{name} has {dimensions} dimensions")
            sides = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
            kind, offset = struct.unpack("<IQ", cursor.take(12))
            # A weight takes more than a bit: a product beyond this is not in the file.
            elements = 1
            for side in sides:
                elements *= side
                if side == 0 or elements > 8 * self.size:
                    raise self.damaged(f"{name} has the shape {list(sides)}")
            infos.append((name, kind, tuple(reversed(sides)), offset))
        start = cursor.at + -cursor.at % self._alignment()
        tensors: dict[str, TensorInfo] = {}
        for name, kind, shape, offset in infos:
            if name in tensors:
                raise self.damaged(f"it has the tensor {name} twice")
            if offset % self._alignment() or offset > self.size - start:
                raise self.damaged(f"{name} stands at {offset}, outside of it or not aligned")
            tensors[name] = TensorInfo(kind, shape, start + offset)
        return tensors

    def _alignment(self) -> int:
        alignment = self.integer("general.alignment", _ALIGNMENT)
        if not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.damaged(f"its alignment is {alignment}")
        return alignment


class _Cursor:
    """A place in the mapped file that only moves within it."""

    def __init__(self, file: GgufFile, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0
        self._file = file
        self._strings = 0

    def take(self, count: int) -> bytes:
        start = self.at
        self._skip(count)
        return self.data[start : self.at]

    def string(self, longest: int) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        if length > longest:
            raise self._file.damaged(f"a name is {length} bytes long")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self._file.damaged("a name is not UTF-8") from error

    def skip_value(self) -> None:
        (kind,) = struct.unpack("<I", self.take(4))
        if kind == _STRING:
            self._skip_strings(1)
        elif kind in _CODES:
            self._skip(_CODES[kind][1].size)
        elif kind == _ARRAY:
            element, count = struct.unpack("<IQ", self.take(12))
            if element == _STRING:
                self._skip_strings(count)
            elif element in _CODES:
                self._skip(_CODES[element][1].size * count)
            else:
                raise self._file.damaged(f"an array has elements of type {element}")
        else:
            raise self._file.damaged(f"a value has type {kind}")

    def _skip_strings(self, count: int) -> None:
        self._strings += count
        if self._strings > _MOST_STRINGS or 8 * count > self._file.size - self.at:
            raise self._file.damaged(f"it claims {count} strings in one array")
        length = struct.Struct("<Q")
        for _ in range(count):
            if self.at + 8 > self._file.size:
                raise self._file.damaged("it ends within a string")
            self._skip(8 + length.unpack_from(self.data, self.at)[0])

    def _skip(self, count: int) -> None:
        if count > self._file.size - self.at:
            raise self._file.damaged("it ends before its header does")
        self.at += count


def _decode(raw: bytes) -> Any:
    """A value from its bytes, which have been walked: str, bool, int, float, list or array."""
    (kind,) = struct.unpack_from("<I", raw)
    if kind == _STRING:
        return raw[12:].decode(errors="replace")
    if kind in _CODES:
        return _CODES[kind][1].unpack_from(raw, 4)[0]
    element, count = struct.unpack_from("<IQ", raw, 4)
    if element != _STRING:
        return np.frombuffer(raw, _CODES[element][1].format, count, 16)
    found = []
    at = 16
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", raw, at)
        found.append(raw[at + 8 : at + 8 + length].decode(errors="replace"))
        at += 8 + length
    return found
