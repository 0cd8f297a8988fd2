"""CUDA C++ compiled at run time: NVRTC, and the cubins of earlier runs on disk.

NVRTC needs no GPU and no CUDA toolkit; it comes with torch's CUDA builds (nvidia-cuda-nvrtc).
"""

import ctypes
import hashlib
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path

from qexport.cache import cache_folder
from qexport.errors import UnsupportedError

__all__ = ["architectures", "compile_cubin", "nvrtc_version"]

_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
_FLAGS = ("--std=c++17", "-default-device", "--restrict")


def compile_cubin(name: str, sources: Mapping[str, str], architecture: str) -> bytes:
    """Machine code of `sources[name]`, which may include the others, for `sm_90a` and the like.

    Taken from the cache ($QEXPORT_CACHE, or ~/.cache/qexport) where the same sources were compiled
    by the same NVRTC before; processes that begin together may both compile and write the same.
    Raises UnsupportedError without NVRTC, or for an architecture that it does not know.
    """
    key = hashlib.sha256()
    for part in (name, architecture, *_FLAGS, str(nvrtc_version())):
        key.update(part.encode() + b"\0")
    for file, text in sorted(sources.items()):
        key.update(file.encode() + b"\0" + text.encode() + b"\0")
    path = cache_folder("cubins") / f"{Path(name).stem}-{architecture}-{key.hexdigest()}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = _compile(name, sources, architecture)
    _write(path, cubin)
    return cubin


@lru_cache(maxsize=1)
def architectures() -> frozenset[int]:
    """Those that it compiles for: 90 for sm_90. Raises UnsupportedError without NVRTC."""
    count = c_int()
    _check(_library().nvrtcGetNumSupportedArchs(byref(count)))
    found = (c_int * count.value)()
    _check(_library().nvrtcGetSupportedArchs(found))
    return frozenset(found)


@lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    """Major and minor version. Raises UnsupportedError without NVRTC."""
    major, minor = c_int(), c_int()
    _check(_library().nvrtcVersion(byref(major), byref(minor)))
    return major.value, minor.value


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = c_char_p
        return library
    raise UnsupportedError(
        "NVRTC, which compiles the CUDA kernels, is not here; pip install nvidia-cuda-nvrtc."
    )


def _candidates() -> Iterator[str]:
    """Where NVRTC may be: NVIDIA's wheels beside torch, then wherever the system looks."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        yield from sorted(map(str, Path(folder).glob("c*/lib/libnvrtc.so.*")), reverse=True)
    yield from _NAMES


def _compile(name: str, sources: Mapping[str, str], architecture: str) -> bytes:
    library, program = _library(), c_void_p()
    headers = [(file, text) for file, text in sources.items() if file != name]
    count = len(headers)
    texts = (c_char_p * count)(*(text.encode() for _, text in headers))
    names = (c_char_p * count)(*(file.encode() for file, _ in headers))
    _check(
        library.nvrtcCreateProgram(
            *(byref(program), sources[name].encode(), name.encode(), count, texts, names)
        )
    )
    try:
        flags = [flag.encode() for flag in (*_FLAGS, f"--gpu-architecture={architecture}")]
        made = library.nvrtcCompileProgram(program, len(flags), (c_char_p * len(flags))(*flags))
        if made:
            log = _fetch(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            said = log.rstrip(b"\0").decode(errors="replace").strip() or _said(made)
            raise UnsupportedError(f"{name} does not compile for {architecture}: {said}")
        return _fetch(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(byref(program))


def _fetch(
    size_of: "ctypes._NamedFuncPointer", read: "ctypes._NamedFuncPointer", program: c_void_p
) -> bytes:
    size = c_size_t()
    _check(size_of(program, byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(read(program, buffer))
    return buffer.raw


def _check(result: int) -> None:
    if result:
        raise UnsupportedError(f"NVRTC failed: {_said(result)}.")


def _said(result: int) -> str:
    return str(_library().nvrtcGetErrorString(result).decode())


def _write(path: Path, cubin: bytes) -> None:
    """Whole or not at all; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        Path(file.name).replace(path)
    except OSError:
        return
