"""What each CUDA kernel takes of a multiprocessor: registers, shared memory, spills, instructions.

`python -m benchmarks.cuda_resources` compiles the kernels with NVRTC, for architectures that need
not be here, and reads cuobjdump's report and nvdisasm's listing (Triton brings both). "loop" counts
the instructions of the innermost loop for each weight of a lane: the budget at full bandwidth of an
H200 is 128 lanes a clock over 66 weights at 2 bits, 44 at 3 and 33 at 4.
"""

import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

import torch

from benchmarks.cuda_decode import tool
from qexport.runtime.kernels.cuda_matmul import dense_text, matmul_text
from qexport.runtime.kernels.cuda_source import DENSE_SHARED, WeightKind, compiled
from qexport.runtime.kernels.cuda_tiles import tile_for
from qexport.runtime.kernels.nvrtc import nvrtc_version

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cuda-compiled" / "resources.json"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
TOKENS = (1, 16, 32, 64, 512)
# bits, twice the zero point, zero points per group, inputs that share a scale
KINDS = [
    *(
        (bits, zero, False, span)
        for bits, zero in ((1, 1), (2, 3), (3, 8), (4, 16))
        for span in (32, 128, 0)
    ),
    *((bits, 0, True, span) for bits in (2, 3, 4) for span in (32, 128)),
]
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_JUMP = re.compile(r"BRA.*`\((\.L_x_\d+)\)")


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, bytes of stack, and loads and stores of spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = _run(tool("cuobjdump"), "--dump-resource-usage", file.name)
        listing = _run(tool("nvdisasm"), "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    names = [match.group(1) for match in map(_LINE.match, listing.splitlines()) if match]
    spilled = sum(name in ("LDL", "STL") for name in names)
    return {
        "registers": int(found.group(1)),
        "stack": int(found.group(2)),
        "spilled": spilled,
        "loop": longest_loop(listing),
    }


def longest_loop(listing: str) -> int:
    """Instructions of the longest loop that has tensor core instructions."""
    at: dict[str, int] = {}
    names: list[str] = []
    longest = 0
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            at[label.group(1)] = len(names)
        elif operation := _LINE.match(line):
            names.append(operation.group(1))
            jump = _JUMP.search(line)
            if jump and jump.group(1) in at:
                body = names[at[jump.group(1)] :]
                if any(name in ("HMMA", "HGMMA") for name in body):
                    longest = max(longest, len(body))
    return longest


def measure(
    architecture: str, kind: WeightKind, tokens: int, half: torch.dtype
) -> dict[str, object]:
    """One matmul kernel, by the rule's tile."""
    tile = tile_for(architecture, kind, tokens)
    found = resources(compiled(matmul_text(kind, tile, half), architecture))
    # one turn of the loop goes through `ahead` + 1 chunks
    weights = 8 * tile.tiles * _chunk(kind.bits) * (tile.ahead + 1) // 16
    return {
        "kernel": f"matmul {kind.bits} bits{' zeros' if kind.zeros else ''} span {kind.span}",
        "tokens": tokens,
        "tile": list(astuple(tile)),
        **found,
        "shared": tile.shared,
        "loop": round(found["loop"] / weights, 2),
    }


def measure_dense(architecture: str, kind: WeightKind, half: torch.dtype) -> dict[str, object]:
    found = resources(compiled(dense_text(kind, half), architecture))
    del found["loop"]
    return {
        "kernel": f"dequantize {kind.bits} bits span {kind.span}",
        **found,
        "shared": DENSE_SHARED,
    }


def _chunk(bits: int) -> int:
    from qexport.runtime.kernels.cuda_layout import chunk_inputs

    return chunk_inputs(bits)


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


def main() -> None:
    """Compile, print and record."""
    kinds = [WeightKind(*kind, torch.float16) for kind in KINDS]
    table: dict[str, list[dict[str, object]]] = {}
    with ThreadPoolExecutor(2) as pool:
        for architecture in ARCHITECTURES:
            work = [
                (architecture, kind, tokens, torch.bfloat16) for kind in kinds for tokens in TOKENS
            ]
            rows = list(pool.map(lambda job: measure(*job), work))
            rows += [measure_dense(architecture, kind, torch.bfloat16) for kind in kinds]
            table[architecture] = rows
            for row in rows:
                print(architecture, *row.values())
    version = ".".join(map(str, nvrtc_version()))
    lines = ",\n".join(
        f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]"
        for name, rows in table.items()
    )
    RESULT.write_text(f'{{\n "nvrtc": "{version}",\n{lines}\n}}\n')


if __name__ == "__main__":
    main()
