"""What is published: an sdist, the wheel that is built from it, and that alone at work."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_SDIST = "from setuptools.build_meta import build_sdist; print(build_sdist({!r}))"


def call(*words: object, **options: object) -> str:
    made = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return str(made.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as pip does where no wheel fits."""
    folder = tmp_path_factory.mktemp("dist")
    copy = folder / "copy"  # building writes beside the sources
    call("git", "clone", "--quiet", ROOT, copy)
    changed = call("git", "ls-files", "-mo", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, changed):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
        else:
            (copy / name).unlink(missing_ok=True)
    name = call(sys.executable, "-W", "ignore", "-c", _SDIST.format(str(folder)), cwd=copy)
    sdist = folder / name.split()[-1]
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, sdist, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_alone_trains(wheel: Path, tmp_path: Path) -> None:
    assert wheel.stat().st_size < 5_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qexport"}
    wanted = ("formats/SPEC.md", "runtime/csrc/cuda/matmul.cuh", "runtime/server/page/index.html")
    assert {f"qexport/{name}" for name in wanted} <= set(names)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    where = call(
        *(sys.executable, "-c", "import qexport; print(qexport.__file__)"),
        cwd=tmp_path,
        env=environment,
    )
    assert where.startswith(str(tmp_path))
    smoke = (sys.executable, "-m", "qexport", "train", "--smoke")
    assert "0 differing bits" in call(*smoke, cwd=tmp_path, env=environment)


@pytest.mark.slow
def test_kernels_come_with_the_wheel(wheel: Path) -> None:
    """Where there is a compiler, as `make test` asks for."""
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.startswith("qexport/runtime/kernels/_cpu.") for name in archive.namelist())
