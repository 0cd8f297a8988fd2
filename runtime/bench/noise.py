"""Whether a machine was quiet while something was measured."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Noise"]

_OTHERS = 0.05  # of the machine's time, that other processes may take
_STOLEN = 0.02  # of it, that a hypervisor may
_FEWEST = 4  # repeats that say something
_SPREAD = 0.10  # of a median, between quartiles


@dataclass
class Noise:
    """Time that others took while runs were timed, and how far their repeats lie apart."""

    others: float = 0.0
    stolen: float = 0.0
    seconds: float = 0.0
    spreads: dict[str, float] = field(default_factory=dict)

    def begin(self, own: float) -> None:
        """Before something is timed; `own` are CPU seconds of what is timed, so far."""
        self._before = (*_busy_and_stolen(), own, time.monotonic())

    def end(self, own: float) -> None:
        """After it."""
        busy, stolen = _busy_and_stolen()
        old_busy, old_stolen, old_own, began = self._before
        self.seconds += time.monotonic() - began
        self.stolen += stolen - old_stolen
        self.others += max(0.0, busy - old_busy - (own - old_own))

    def spread(self, what: str, values: list[float]) -> None:
        """Take note of repeats of one thing."""
        ordered = sorted(values)
        if len(ordered) >= _FEWEST:
            low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
            self.spreads[what] = (high - low) / ordered[len(ordered) // 2]

    def reasons(self) -> list[str]:
        """Why the figures are not clean; nothing where they are."""
        found = self.taken()
        if not self.spreads:
            found.append(f"fewer than {_FEWEST} repeats are too few to tell")
        wide = {what: share for what, share in self.spreads.items() if share > _SPREAD}
        if wide:
            worst = max(wide, key=lambda what: wide[what])
            found.append(
                f"repeats of {len(wide)} of {len(self.spreads)} measurements lie more than "
                f"{_SPREAD:.0%} apart, those of {worst} {wide[worst]:.0%}"
            )
        return found

    def taken(self) -> list[str]:
        """Who else has had the machine; nothing where nobody had much of it."""
        found = []
        total = self.seconds * (os.cpu_count() or 1)
        if not Path("/proc/stat").exists():
            found.append("this system does not tell what other processes do")
        elif total:
            for share, most, who in (
                (self.others / total, _OTHERS, "other processes"),
                (self.stolen / total, _STOLEN, "the hypervisor"),
            ):
                if share > most:
                    found.append(f"{who} took {share:.0%} of the machine")
        return found


def _busy_and_stolen() -> tuple[float, float]:
    """Seconds that all cores have run processes for, and that they were not given."""
    try:
        line = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return 0.0, 0.0
    user, nice, system, _, _, irq, soft, stolen, *_ = map(int, line.split()[1:])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + soft) / tick, stolen / tick
