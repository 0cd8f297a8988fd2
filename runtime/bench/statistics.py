"""Percentiles of what requests took.

For a request of n tokens that came at t1..tn after it was sent: TTFT = t1, ITL = the gaps between
tokens, TPOT = (tn - t1) / (n - 1), E2E = tn.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

__all__ = ["percentiles", "request_times"]

_PERCENTILES = (50, 90, 99)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th, the quartiles, and how many there were; seconds, interpolated."""
    if not len(values):
        return {"count": 0}
    found = {f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES}
    low, high = np.percentile(values, (25, 75))
    return {**found, "p25": float(low), "p75": float(high), "count": len(values)}


def request_times(times: Iterable[Sequence[float]]) -> dict[str, list[float]]:
    """{ttft, tpot, itl, e2e} of requests, by the times at which their tokens came."""
    found: dict[str, list[float]] = {"ttft": [], "tpot": [], "itl": [], "e2e": []}
    for came in times:
        found["ttft"].append(came[0])
        found["e2e"].append(came[-1])
        if len(came) > 1:
            found["tpot"].append((came[-1] - came[0]) / (len(came) - 1))
            found["itl"] += [after - before for before, after in pairwise(came)]
    return found
