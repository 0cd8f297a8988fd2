"""The shape of the package: public names, exit codes, no pickle, nothing heavy at import."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import qexport
from qexport import errors

ROOT = Path(__file__).parent.parent


def test_public_names_are_documented_and_sorted() -> None:
    for info in pkgutil.walk_packages(qexport.__path__, "qexport."):
        if info.name in ("qexport.__main__", "qexport.runtime.kernels._cpu"):
            continue  # the latter is no module: ctypes loads it
        if info.name.startswith("qexport.runtime.vllm_plugin"):
            continue  # imports vLLM, which stands in the oracle environment; tested there
        module = importlib.import_module(info.name)
        names = getattr(module, "__all__", [])
        for name in names:
            value = getattr(module, name)
            ours = getattr(value, "__module__", "").startswith("qexport")
            if ours and (inspect.isfunction(value) or inspect.isclass(value)):
                assert value.__doc__, f"{info.name}.{name} has no docstring"


def test_the_package_exports_what_it_says() -> None:
    for name in qexport.__all__:
        assert callable(getattr(qexport, name)) or name == "__version__"
    assert sorted(qexport.__all__) == qexport.__all__


def test_importing_qexport_is_light() -> None:
    code = "import sys, qexport; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_exit_codes() -> None:
    expected = {
        "QexportError": 1,
        "CheckpointError": 1,
        "DataError": 1,
        "RefusedError": 1,
        "InputError": 2,
        "VerificationError": 3,
        "UnsupportedError": 4,
    }
    assert {name: getattr(errors, name).exit_code for name in errors.__all__} == expected


def test_no_pickle_anywhere() -> None:
    pattern = re.compile(
        r"torch\.(load|save)\(|import pickle|pickle\.load|joblib|trust_remote_code=True"
    )
    for folder in ("qexport", "formats", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not pattern.search(path.read_text()), path
