"""Fair timings: the order of the runs, medians and ratios by hand, a slow contestant, and fits with known answers."""

import itertools
import math
import time

import pytest

from benchmarks.timing import LEAST, Timing, compare, fit_line, fit_power, ratio, schedule


def test_equal_counts_take_turns():
    assert schedule({"a": 3, "b": 3}) == ["a", "b", "a", "b", "a", "b"]


def test_the_runs_of_a_slow_one_are_spread_among_those_of_the_fast():
    assert schedule({"fast": 6, "slow": 2}) == ["fast", "fast", "slow", "fast", "fast", "fast", "slow", "fast"]
    order = schedule({"fast": 12, "slow": 3})
    at = [k for k, name in enumerate(order) if name == "slow"]
    assert order.count("fast") == 12 and len(at) == 3
    assert max(b - a for a, b in itertools.pairwise(at)) <= 5 and at[0] >= 2 and at[-1] <= len(order) - 3


def test_median_and_quartiles_by_hand():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0), processor_s=30.0)
    assert timing.median_s == 3.0 and timing.quartiles_s == (2.0, 4.0)
    assert timing.cores == 2.0
    assert Timing((2.0, 1.0)).quartiles_s == (1.0, 2.0)


def test_ratio_and_its_bounds_by_hand():
    actual = ratio(Timing((10.0, 20.0, 30.0)), Timing((1.0, 2.0, 4.0)))
    assert (actual.value, actual.low, actual.high) == (10.0, 2.5, 30.0)


class Clock:
    """A clock that contestants move."""

    def __init__(self, monkeypatch):
        self.now, self.runs = 0.0, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "process_time", lambda: self.now / 2)

    def takes(self, name: str, seconds: float, first: float = 0.0):
        def call():
            self.now += first if name not in self.runs and first else seconds
            self.runs.append(name)

        return call


def test_fast_and_slow_get_their_share_of_the_budget_and_compiling_is_not_measured(monkeypatch):
    clock = Clock(monkeypatch)
    timings = compare({"a": clock.takes("a", 0.25, first=0.9), "b": clock.takes("b", 2.0)}, budget_s=2.0)
    assert [len(timings[n].runs_s) for n in "ab"] == [4, LEAST]
    assert timings["a"].median_s == 0.25 and timings["b"].median_s == 2.0 and timings["b"].cores == 0.5
    warm = ["a", "a", "b"]  # the slow one took more than its share in its first run
    assert clock.runs[:3] == warm and len(clock.runs) == 3 + 4 + LEAST
    assert clock.runs[3:] == schedule({"a": 4, "b": LEAST})


def test_nobody_runs_more_often_than_asked_and_the_device_is_waited_for(monkeypatch):
    clock, waits = Clock(monkeypatch), []
    timings = compare({"a": clock.takes("a", 1e-4)}, budget_s=9.0, most=6, synchronise=lambda: waits.append(0))
    assert len(timings["a"].runs_s) == 6
    assert len(waits) == 2 * len(clock.runs)
    assert compare({}, budget_s=1.0) == {}


def test_a_power_law_is_found_again():
    x = [32.0, 64.0, 96.0, 192.0]
    a, b, r2 = fit_power(x, [3e-3 * n**2 for n in x])
    assert a == pytest.approx(3e-3) and b == pytest.approx(2) and r2 == pytest.approx(1)
    assert fit_power([1.0, 2.0], [5.0, 5.0]) == (5.0, 0.0, 1.0)
    _, b, r2 = fit_power([1.0, 2.0, 4.0], [1.0, 4.0, 4.0])
    assert b == pytest.approx(1) and r2 == pytest.approx(0.75)


def test_a_line_is_found_again():
    a, b, r2 = fit_line([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert (a, b) == (pytest.approx(1), pytest.approx(2)) and r2 == pytest.approx(1)
    a, b, r2 = fit_line([0.0, 1.0, 2.0], [0.0, 3.0, 0.0])
    assert math.isclose(a, 1) and b == pytest.approx(0, abs=1e-12) and r2 == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("x", "y"), [([1.0], [1.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 1.0])])
def test_what_cannot_be_fitted_is_refused(x, y):
    with pytest.raises(ValueError, match="wanted two or more"):
        fit_power(x, y)
