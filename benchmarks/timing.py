"""Fair timings: everything warm, contestants taken in turn, medians with their spread, ratios of medians.

A machine's speed drifts over minutes, so contestants that are to be compared are interleaved: A B A B ..., and where B
is so slow that it can only be run a few times, its runs are spread evenly among those of A (A A B A A B ...).
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

MOST, LEAST = 15, 3  # runs of one contestant


@dataclass(frozen=True)
class Timing:
    """Seconds of every run of one contestant, and processor seconds of all of them together."""

    runs_s: tuple[float, ...]
    processor_s: float = 0.0

    @property
    def median_s(self) -> float:
        return statistics.median(self.runs_s)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """Where a quarter of the runs lies below, and above; the extremes where there are fewer than four."""
        if len(self.runs_s) < 4:
            return min(self.runs_s), max(self.runs_s)
        low, _, high = statistics.quantiles(self.runs_s, n=4, method="inclusive")
        return low, high

    @property
    def cores(self) -> float:
        """Processor time over wall time: how many cores were busy on average."""
        return self.processor_s / max(sum(self.runs_s), 1e-12)


@dataclass(frozen=True)
class Ratio:
    """How many times as long `other` takes as `ours`, and the same from quartile to quartile, as bounds."""

    value: float
    low: float
    high: float


def ratio(other: Timing, ours: Timing) -> Ratio:
    """Return the ratio of the medians; its bounds set the fast quarter of one against the slow quarter of the other."""
    low, high = other.quartiles_s[0] / ours.quartiles_s[1], other.quartiles_s[1] / ours.quartiles_s[0]
    return Ratio(other.median_s / ours.median_s, low, high)


def schedule(counts: dict[str, int]) -> list[str]:
    """Return the order of the runs: run k of n at the time (k + 1/2) / n, ties in the order given."""
    at = [((k + 0.5) / n, rank, name) for rank, (name, n) in enumerate(counts.items()) for k in range(n)]
    return [name for _, _, name in sorted(at)]


def compare(
    contestants: dict[str, Callable[[], object]],
    *,
    budget_s: float,
    synchronise: Callable[[], object] | None = None,
    most: int = MOST,
) -> dict[str, Timing]:
    """Time contestants against each other.

    Each is run once to compile and load, once more to see how long it takes (unless the first took its whole share),
    then as often as its share of the time allows, LEAST to `most` times, interleaved.
    Args:
        contestants: what to call, by name.
        budget_s: seconds for all measured runs together, exceeded only by LEAST runs of slow contestants.
        synchronise: waits for a device; called before and after every run.
    """
    share = budget_s / max(len(contestants), 1)
    counts = {}
    for name, call in contestants.items():
        seconds, _ = _timed(call, synchronise)
        if seconds < share:
            seconds, _ = _timed(call, synchronise)
        counts[name] = max(LEAST, min(most, math.floor(share / max(seconds, 1e-9))))
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall on whoever happens to run
    try:
        for name in schedule(counts):
            runs[name].append(_timed(contestants[name], synchronise))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(s for s, _ in times), sum(p for _, p in times)) for name, times in runs.items()}


def _timed(call: Callable[[], object], synchronise: Callable[[], object] | None) -> tuple[float, float]:
    """Wall and processor seconds of one run; what it returns is freed afterwards."""
    if synchronise is not None:
        synchronise()
    began, busy = time.perf_counter(), time.process_time()
    result = call()
    if synchronise is not None:
        synchronise()
    times = time.perf_counter() - began, time.process_time() - busy
    del result
    return times


def fit_power(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """y = a x^b by least squares on the logarithms.

    Args:
        x, y: positive, of equal length, at least two different x.
    Returns: a, b, and R^2 of the fit (1 where all y are equal).
    """
    if len(x) != len(y) or len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"x, y: wanted two or more different positive x with as many positive y, got {x} and {y}")
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    if len(set(v)) == 1:
        return y[0], 0.0, 1.0
    slope, offset = statistics.linear_regression(u, v)
    return math.exp(offset), slope, statistics.correlation(u, v) ** 2


def fit_line(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """y = a + b x by least squares; returns a, b and R^2 (1 where all y are equal)."""
    if len(x) != len(y) or len(set(x)) < 2:
        raise ValueError(f"x, y: wanted two or more different x with as many y, got {x} and {y}")
    if len(set(y)) == 1:
        return y[0], 0.0, 1.0
    slope, offset = statistics.linear_regression(x, y)
    return offset, slope, statistics.correlation(x, y) ** 2
