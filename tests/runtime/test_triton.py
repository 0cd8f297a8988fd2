"""The Triton kernel: under Triton's interpreter, and compiled for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="triton is a dependency of tests on Linux only"
)
HERE = Path(__file__).parent


def run(*arguments: str, interpret: str, cache: Path) -> str:
    """Standard output of Python in this folder's project."""
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=500,
        cwd=HERE.parent.parent,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.mark.parametrize("name", ["triton_interpreter.py", "step_interpreter.py"])
def test_it_equals_the_reference(name: str, tmp_path: Path) -> None:
    """The products: every scheme, shapes, dtypes; and what decoding steps do between them."""
    file = str(HERE / name)
    shown = run("-m", "pytest", "-q", file, interpret="1", cache=tmp_path)
    assert " passed" in shown and "skipped" not in shown


@pytest.mark.slow
def test_it_compiles_for_gpus(tmp_path: Path) -> None:
    """By the assembler that Triton brings: products, and the kernels of steps."""
    shown = run(str(HERE / "triton_compile.py"), interpret="0", cache=tmp_path)
    assert shown.count("cubin") == 11 + 3 * 5
