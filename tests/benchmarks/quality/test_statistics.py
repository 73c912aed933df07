"""Intervals and comparisons on cases that can be worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.quality.statistics import bootstrap, compare, sign_flip_p, sign_test_p


def test_bootstrap_of_equal_values_has_no_width():
    interval = bootstrap({"a": [2.0, 2.0], "b": [2.0]})
    assert (interval.mean, interval.low, interval.high, interval.prompts) == (2, 2, 2, 2)


def test_bootstrap_of_two_prompts_spans_both():
    # resampled means are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    interval = bootstrap({"a": [0.0], "b": [1.0]})
    assert (interval.mean, interval.low, interval.high) == (0.5, 0, 1)


def test_bootstrap_interval_is_the_normal_one_for_many_prompts():
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = bootstrap({str(k): [v] for k, v in enumerate(values)})
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_bootstrap_weighs_prompts_equally_and_draws_seeds_within_them():
    # one prompt, seeds 0 and 1: resampled means are 0, 1/2, 1
    one = bootstrap({"a": [0.0, 1.0]})
    assert (one.mean, one.low, one.high) == (0.5, 0, 1)
    assert bootstrap({"a": [0.0, 0.0, 0.0], "b": [1.0]}).mean == 0.5


def test_bootstrap_leaves_out_what_is_not_finite():
    interval = bootstrap({"a": [1.0, math.nan], "b": [math.inf]})
    assert (interval.mean, interval.prompts) == (1, 1)
    assert math.isnan(bootstrap({"a": [math.nan]}).mean)


@pytest.mark.slow
def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng, inside = np.random.default_rng(1), 0
    for k in range(40):
        values = {str(i): list(rng.normal(0, 1) + rng.normal(0, 0.5, 2)) for i in range(24)}
        interval = bootstrap(values, seed=k)
        inside += interval.low <= 0 <= interval.high
    assert 34 <= inside <= 40


def test_sign_test_of_nine_against_three():
    # 2 (C(12,9) + C(12,10) + C(12,11) + 1) / 4096 = 2 (220 + 66 + 12 + 1) / 4096
    assert sign_test_p(9, 3) == pytest.approx(598 / 4096)
    assert sign_test_p(3, 9) == sign_test_p(9, 3)
    assert sign_test_p(0, 0) == sign_test_p(2, 2) == 1


def test_sign_flip_p_of_three_equal_differences_is_a_quarter():
    assert sign_flip_p(np.array([1.0, 1.0, 1.0])) == 2 / 8


def test_sign_flip_p_by_enumeration():
    # |+-1 +-2 +-4| >= 5: 7 = 1+2+4, 5 = -1+2+4, and their negatives, of 8
    assert sign_flip_p(np.array([-1.0, 2.0, 4.0])) == 4 / 8


def test_sign_flip_p_of_many_differences_agrees_with_the_normal_law():
    d = np.random.default_rng(2).normal(0.3, 1, 60)
    z = d.sum() / math.sqrt((d**2).sum())
    assert sign_flip_p(d) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.02)


def test_compare_pairs_prompts_and_averages_seeds():
    a = {"x": [1.0, 3.0], "y": [1.0], "z": [5.0], "only a": [9.0]}
    b = {"x": [1.0], "y": [1.0], "z": [7.0, 7.0], "only b": [9.0]}
    result = compare(a, b)
    assert (result.wins, result.losses, result.ties) == (1, 1, 1)
    assert result.difference.mean == pytest.approx((1 + 0 - 2) / 3)
    assert result.difference.prompts == 3
    back = compare(b, a)
    assert (back.wins, back.p_value, back.difference.mean) == (1, result.p_value, -result.difference.mean)


def test_compare_of_nothing_in_common():
    result = compare({"x": [1.0]}, {"y": [1.0]})
    assert (result.wins, result.losses, result.ties, result.p_sign) == (0, 0, 0, 1)
    assert math.isnan(result.p_value)
