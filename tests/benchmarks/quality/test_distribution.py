"""The kernel distance of all objects together: nothing for the same ones, a case by hand, what it should notice."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.quality.distribution import distance


def drawn(rng: np.random.Generator, prompts: int, shift: float = 0.0, seeds: int = 1) -> dict[str, np.ndarray]:
    """Unit embeddings of a system, by prompt."""
    rows = rng.normal(size=(prompts, seeds, 8)) + shift
    return {f"p{k}": row / np.linalg.norm(row, axis=-1, keepdims=True) for k, row in enumerate(rows)}


def test_the_truth_against_itself_is_nothing():
    truth = drawn(np.random.default_rng(0), 10)
    assert distance(truth, truth).mean == pytest.approx(0, abs=1e-9)


def test_objects_drawn_alike_are_nothing_in_the_mean_also_at_few_prompts():
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found.append(distance(drawn(rng, 6), drawn(rng, 6)).mean)
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error < 2


def test_three_prompts_by_hand():
    a, b = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    truth = {"x": a, "y": b, "z": b}  # squared distances 2, 2, 0: the median is 2
    always = {"x": a, "y": a, "z": a}
    far = np.exp(-2 / (2 * 2))
    cross = np.array([[1, far, far], [1, far, far], [1, far, far]])
    theirs = np.array([[1, far, far], [far, 1, 1], [far, 1, 1]])
    terms = 1 + theirs - cross - cross.T
    assert distance(always, truth).mean == pytest.approx(100 * terms[~np.eye(3, dtype=bool)].mean())


def test_a_system_that_always_draws_the_same_is_noticed():
    rng = np.random.default_rng(1)
    truth, likewise = drawn(rng, 20), drawn(rng, 20, seeds=2)
    same = {prompt: next(iter(likewise.values())) for prompt in likewise}
    assert distance(same, truth).low > distance(likewise, truth).high


def test_a_shift_is_noticed_and_lies_within_its_interval():
    rng = np.random.default_rng(2)
    interval = distance(drawn(rng, 20, shift=1.0), drawn(rng, 20))
    assert 0 < interval.low < interval.mean < interval.high < 200


def test_prompts_that_only_one_side_has_are_left_out():
    rng = np.random.default_rng(3)
    truth = drawn(rng, 10)
    some = {prompt: row for prompt, row in drawn(rng, 10).items() if prompt in ("p0", "p1", "p2")}
    assert distance(some, truth).prompts == 3
    assert distance({k: some[k] for k in ("p0", "p1")}, truth).prompts == 2
    assert np.isnan(distance({}, truth).mean)
