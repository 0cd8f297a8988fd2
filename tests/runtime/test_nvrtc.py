"""CUDA C++ compiled without a GPU: NVRTC, its cache, and what it makes of decode.cuh."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cuda_decode import GRIDS, count
from qexport.errors import UnsupportedError
from qexport.runtime.kernels import nvrtc

SOURCE = {"k.cu": '#include "one.h"\nextern "C" __global__ void k(int* x) { *x = ONE; }'}
HEADER = {"one.h": "#define ONE 1\n"}
# operations for each weight: one LOP3 and one HFMA2 for two, and the shifts between
MOST = {"binary": 1.125, "ternary": 1.125, "seq2": 1.1875, "int2": 1.125, "int3": 1.375} | {
    "int4": 1.375
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QEXPORT_CACHE", str(tmp_path))
    return tmp_path / "cubins"


@pytest.fixture
def compiler() -> None:
    """On Linux `make setup` installs it: where it cannot be loaded there, tests fail."""
    if sys.platform != "linux":
        pytest.skip("NVRTC is a dependency of tests on Linux only")


@pytest.mark.usefixtures("compiler")
def test_a_cubin_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = nvrtc.compile_cubin("k.cu", {**SOURCE, **HEADER}, "sm_90a")
    assert first.startswith(b"\x7fELF")
    assert [path.read_bytes() for path in cache.iterdir()] == [first]
    changed = nvrtc.compile_cubin("k.cu", {**SOURCE, "one.h": "#define ONE 2\n"}, "sm_90a")
    other = nvrtc.compile_cubin("k.cu", {**SOURCE, **HEADER}, "sm_80")
    assert len({first, changed, other}) == 3
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.compile_cubin("k.cu", {**SOURCE, **HEADER}, "sm_90a") == first


@pytest.mark.usefixtures("compiler")
def test_processes_may_begin_together(cache: Path) -> None:
    code = (
        "from qexport.runtime.kernels.nvrtc import compile_cubin\n"
        f"print(len(compile_cubin('k.cu', { ({**SOURCE, **HEADER})!r}, 'sm_80')))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    sizes = {process.communicate()[0] for process in running}
    assert len(sizes) == 1 and [process.returncode for process in running] == [0] * 4
    assert len(list(cache.iterdir())) == 1


@pytest.mark.usefixtures("compiler")
def test_what_does_not_compile_says_why(cache: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"k.cu does not compile for sm_80: .*\bONE\b"):
        nvrtc.compile_cubin("k.cu", {**SOURCE, "one.h": ""}, "sm_80")
    with pytest.raises(UnsupportedError, match="does not compile for sm_1"):
        nvrtc.compile_cubin("k.cu", {**SOURCE, **HEADER}, "sm_1")
    assert not cache.exists()


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["/nowhere/libnvrtc.so"]))
    nvrtc._library.cache_clear()
    nvrtc.nvrtc_version.cache_clear()
    with pytest.raises(UnsupportedError, match="pip install nvidia-cuda-nvrtc"):
        nvrtc.compile_cubin("k.cu", {**SOURCE, **HEADER}, "sm_80")


@pytest.mark.usefixtures("compiler")
def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QEXPORT_CACHE", str(tmp_path / "file"))
    assert nvrtc.compile_cubin("k.cu", {**SOURCE, **HEADER}, "sm_80").startswith(b"\x7fELF")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_instructions_for_a_weight(grid: str) -> None:
    """What decode.cuh means to cost is what the compiler makes of it."""
    for architecture in ("sm_80", "sm_90a"):
        for half in ("Half", "Bfloat16"):
            found = count(architecture, half, grid)
            assert 1 <= found["all"] <= MOST[grid], (architecture, half, found)
