"""Processes of what is measured: which there are, and how long they have run."""

import os
from pathlib import Path

__all__ = ["family_seconds", "listener"]

_LISTENING = "0A"


def family_seconds(pid: int) -> float:
    """CPU seconds of a process and of all that it has started and that still run."""
    return sum(_cpu_seconds(one) for one in _family(pid))


def listener(port: int) -> int | None:
    """The process that listens on a port of this machine; None where it is not ours to see."""
    sockets = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        try:
            lines = table.read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == _LISTENING:
                sockets.add(f"socket:[{fields[9]}]")
    for file in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(file.readlink()) in sockets:
                return int(file.parts[2])
        except OSError:  # noqa: PERF203  # another user's, or it ended meanwhile
            continue
    return None


def _family(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:  # noqa: PERF203  # it ended meanwhile
                continue
    return found


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
