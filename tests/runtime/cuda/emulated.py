"""CUDA kernels compiled for the host, where host_ptx.h stands in for the GPU's instructions."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import c_int, c_void_p
from pathlib import Path

from torch import Tensor

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "runtime" / "csrc" / "cuda"
COMPILER = shutil.which("g++") or shutil.which("clang++")

_HEAD = """
#include "{header}"
static std::vector<std::pair<const char*, const char*>> ranges_of(long count, void** at) {{
    std::vector<std::pair<const char*, const char*>> ranges;
    for (long i = 0; i < count; ++i)
        ranges.push_back({{(const char*)at[2 * i], (const char*)at[2 * i + 1]}});
    return ranges;
}}
"""
_ENTRY = """
extern "C" const char* run_{index}(const {problem}* problem, const int* grid, int threads,
                                   int shared, unsigned seed, long count, void** ranges) {{
    return qx::host::launch(grid[0], grid[1], grid[2], threads, shared, seed,
                            ranges_of(count, ranges), [=] {{ {instance}::run(*problem); }});
}}
"""


def compile_host(
    folder: Path,
    header: str,
    problem: str,
    instances: Sequence[str],
    sources: Path = SOURCES,
) -> ctypes.CDLL:
    """A library with a function `run_{i}` for each instance of a kernel."""
    assert COMPILER is not None
    text = _HEAD.format(header=header) + "".join(
        _ENTRY.format(index=index, problem=problem, instance=instance)
        for index, instance in enumerate(instances)
    )
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(text)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-I{sources}"]
    subprocess.run([COMPILER, *flags, f"-I{HERE}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def launch(
    library: ctypes.CDLL,
    index: int,
    problem: ctypes.Structure,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    seed: int,
    readable: Sequence[Tensor] | None,
) -> None:
    """Run a kernel; of what it reads 16 bytes at a time all must be in the tensors `readable`."""
    ends = (
        [0, -1]
        if readable is None
        else [
            address
            for storage in (tensor.untyped_storage() for tensor in readable)
            for address in (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
        ]
    )
    run = getattr(library, f"run_{index}")
    run.restype = ctypes.c_char_p
    failed = run(
        ctypes.byref(problem),
        (c_int * 3)(*grid),
        threads,
        shared,
        seed,
        ctypes.c_long(len(ends) // 2),
        (c_void_p * len(ends))(*ends),
    )
    assert failed is None, failed.decode()
