"""Runs the command line, and says at its end how much memory of its own it had at most, in MiB.

Pages of mapped files are not counted: the kernel takes them back when it wants to.
"""

import atexit
import threading
import time
from pathlib import Path

from qexport.cli import main

_peak = 0


def _watch() -> None:
    global _peak  # noqa: PLW0603
    while True:
        status = Path("/proc/self/status").read_text()
        _peak = max(_peak, int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(0.005)


if __name__ == "__main__":
    atexit.register(lambda: print(_peak / 1024))
    threading.Thread(target=_watch, daemon=True).start()
    main()
