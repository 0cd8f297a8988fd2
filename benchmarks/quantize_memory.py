"""What quantizing takes of memory: `qexport quantize` as a process, its largest resident set.

It is what the kernel says of that process itself at its end (VmHWM): the largest resident set of
children, which `getrusage` has, begins with that of the parent that they were forked from.

`python -m benchmarks.quantize_memory [--work FOLDER]` makes a random model of Llama-3.2-1B's shape
(1.2 billion weights) and quantizes it by GPTQ to 4 bits in groups of 128.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.decode import dense_model
from benchmarks.machine import record
from qexport.checkpoint import weight_files

SAMPLES, LENGTH = 16, 512
_CHILD = """
import atexit, pathlib, sys
status = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: status.write_text(pathlib.Path("/proc/self/status").read_text()))
from qexport.cli import main
main()
"""


def main() -> None:
    """Make the model, quantize it, and record what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=None, help="some 10 GB are wanted")
    work = Path(tempfile.mkdtemp(dir=parser.parse_args().work))
    try:
        source = dense_model("1b", work)
        sizes = [path.stat().st_size for path in weight_files(source.folder)]
        asked = ["--method", "gptq", "--bits", "4", "--group-size", "128"]
        asked += ["--calibration", "builtin", "--samples", str(SAMPLES), "--length", str(LENGTH)]
        command = [sys.executable, "-c", _CHILD, str(work / "status"), "quantize"]
        start = time.monotonic()
        subprocess.run([*command, str(source.folder), *asked, "-o", str(work / "run")], check=True)
        seconds = time.monotonic() - start
        found = re.search(r"VmHWM:\s*(\d+) kB", (work / "status").read_text())
        assert found is not None
        results = json.loads((work / "run" / "all_results.json").read_text())
    finally:
        shutil.rmtree(work)
    peak = int(found[1]) * 1024
    row = {
        "model_bytes": sum(sizes),
        "layers": len(results["layers"]),
        "tokens": results["tokens"],
        "seconds": seconds,
        "peak_resident_bytes": peak,
    }
    print(record("quantize-memory-1b", row))
    print(f"{peak / 2**30:.2f} GiB at most, {seconds:.0f} s")


if __name__ == "__main__":
    main()
