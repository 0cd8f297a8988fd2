"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "runtime" / "csrc" / "cpu"
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
def test_kernels_are_clean(tmp_path: Path) -> None:
    assert COMPILER is not None
    # unoptimized: nothing is folded away unchecked, and it compiles in a quarter of the time
    flags = ["-std=c++20", "-O0", "-g1", "-ffp-contract=off", "-pthread", f"-I{SOURCES}"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = []
    building = []
    for source in [*SOURCES.glob("*.cpp"), HERE / "sanitize.cpp"]:
        objects.append(tmp_path / f"{source.stem}.o")
        command = [COMPILER, *flags, *checks, "-w", "-c", str(source), "-o", str(objects[-1])]
        building.append(subprocess.Popen(command))
    assert [process.wait() for process in building] == [0] * len(building)
    program = tmp_path / "sanitize"
    link = [COMPILER, *checks, "-pthread", *map(str, objects), "-o", str(program)]
    subprocess.run(link, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "instruction sets" in done.stdout
