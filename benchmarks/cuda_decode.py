"""Instructions that a GPU spends on taking codes apart, counted in the disassembly.

`python -m benchmarks.cuda_decode` compiles decode.cuh alone with NVRTC, for architectures that need
not be here, and counts by nvdisasm (which Triton brings) what is done for each weight; loads,
stores, addresses and constants are left out. A multiprocessor of an H200 has 64 lanes a clock for
LOP3 and SHF, as many for HFMA2, and issues to 128; at 2 bits memory brings it 66 weights a clock.
"""

import importlib.util
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from qexport.runtime.kernels.nvrtc import compile_cubin, nvrtc_version

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cuda-compiled" / "decode.json"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
GRIDS = {"binary": (1, 1), "ternary": (2, 2), "seq2": (2, 3), "int2": (2, 4), "int3": (3, 8)} | {
    "int4": (4, 16)
}
_KERNEL = """
#include "decode.cuh"
extern "C" __global__ void take_apart(const u32* words, u32* pairs) {
    using W = qx::Words<%(bits)d>;
    u32 w[W::count], p[W::pairs];
    for (int i = 0; i < W::count; ++i) w[i] = words[threadIdx.x + 32 * i];
    qx::decode<qx::%(format)s, %(bits)d, %(twice_zero)d>(w, p);
    for (int i = 0; i < W::pairs; ++i) pairs[threadIdx.x + 32 * i] = p[i];
}
"""
_LINE = re.compile(
    r"^\s+/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)\s+([^;]*);", re.MULTILINE
)


def tool(name: str) -> Path:
    """nvdisasm or cuobjdump, of the Triton package."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None, f"pip install triton, for its {name}"
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


def instructions(cubin: bytes) -> Counter[str]:
    """Operations by their first name, without those that only bring a constant into a register."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True
        )
    found: Counter[str] = Counter()
    for name, operands in _LINE.findall(done.stdout):
        registers = re.findall(r"\bR\d+\b", operands)[1:]
        if name.split(".")[0] in ("LOP3", "SHF", "HFMA2", "IMAD") and registers:
            found[name.split(".")[0]] += 1
    return found


def count(architecture: str, half: str, grid: str) -> dict[str, float]:
    """Operations for each weight."""
    bits, twice_zero = GRIDS[grid]
    text = _KERNEL % {"bits": bits, "twice_zero": twice_zero, "format": half}
    header = (ROOT / "runtime" / "csrc" / "cuda" / "decode.cuh").read_text()
    cubin = compile_cubin(
        "take_apart.cu", {"take_apart.cu": text, "decode.cuh": header}, architecture
    )
    found = instructions(cubin)
    found["IMAD"] -= 2  # addresses of words and pairs
    weights = 32 // bits if bits != 3 else 32
    per_weight = {name: round(number / weights, 3) for name, number in found.items() if number > 0}
    return {**per_weight, "all": round(sum(per_weight.values()), 3)}


def main() -> None:
    """Count, print and record."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for architecture in ARCHITECTURES:
        for half in ("Half", "Bfloat16"):
            row = {grid: count(architecture, half, grid) for grid in GRIDS}
            table[f"{architecture} {half}"] = row
            print(architecture, half, *(f"{grid} {found['all']}" for grid, found in row.items()))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    version = ".".join(map(str, nvrtc_version()))
    RESULT.write_text(json.dumps({"nvrtc": version, "per_weight": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
