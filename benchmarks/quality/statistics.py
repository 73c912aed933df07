"""How sure a benchmark may be: bootstrap intervals over prompts and seeds, and paired comparisons of two systems.

The prompt is the unit: seeds of one prompt are not independent draws of the world of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 10_000
EXACT_BELOW = 16  # prompts up to which all sign flips are enumerated


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float
    prompts: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """a against b on the prompts that both have; differences are a - b of the means over seeds.

    p_value: two-sided, of the sign-flip permutation test on the mean difference. p_sign: of the sign test on wins.
    """

    wins: int
    losses: int
    ties: int
    difference: Interval
    p_value: float
    p_sign: float


def bootstrap(values: Mapping[str, Sequence[float]], confidence: float = 0.95, seed: int = 0) -> Interval:
    """Return the percentile interval of the mean by the two-level bootstrap (Davison & Hinkley 1997, sec. 3.8).

    Prompts are drawn with replacement, then as many seeds of each drawn prompt as it has, with replacement; the mean
    weighs prompts equally. Non-finite values count as absent. With two seeds of mere noise the interval is a fifth too
    wide; where prompts differ, as here, less.

    Args:
        values: by prompt, one number a seed.
    Returns: nan where nothing is present; low = mean = high for a single value.
    """
    rows = [[v for v in row if math.isfinite(v)] for row in values.values()]
    rows = [np.asarray(row, float) for row in rows if row]
    if not rows:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean([row.mean() for row in rows]))
    rng, n = np.random.default_rng(seed), len(rows)
    most = max(len(row) for row in rows)
    resampled = np.empty((RESAMPLES, n))
    table = np.zeros((n, most))
    counts = np.array([len(row) for row in rows])
    for k, row in enumerate(rows):
        table[k, : len(row)] = row
    chosen = rng.integers(0, n, (RESAMPLES, n))
    for k in range(n):  # the k-th drawn prompt of every resample
        prompt = chosen[:, k]
        draws = (rng.random((RESAMPLES, most)) * counts[prompt, None]).astype(int)
        used = np.arange(most)[None] < counts[prompt, None]
        resampled[:, k] = (table[prompt[:, None], draws] * used).sum(1) / counts[prompt]
    means = resampled.mean(1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(mean, float(low), float(high), n)


def compare(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]], seed: int = 0) -> Comparison:
    """Return the paired comparison of two systems over their common prompts.

    Args:
        a, b: by prompt, one number a seed.
    """
    common = [prompt for prompt in a if prompt in b]
    pairs = [(_finite_mean(a[p]), _finite_mean(b[p])) for p in common]
    differences = {p: [x - y] for p, (x, y) in zip(common, pairs, strict=True) if math.isfinite(x - y)}
    d = np.array([v[0] for v in differences.values()])
    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    return Comparison(
        wins,
        losses,
        len(d) - wins - losses,
        bootstrap(differences, seed=seed),
        sign_flip_p(d, seed),
        sign_test_p(wins, losses),
    )


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """Return the two-sided p of the sign-flip permutation test (Fisher): how often random signs give as large a mean.

    Exact for fewer than EXACT_BELOW differences, else from RESAMPLES random flips, the observed one counted among them.
    """
    n = len(differences)
    if n == 0:
        return math.nan
    observed = abs(differences.sum()) * (1 - 1e-12)  # equal sums of other orders count as equal
    if n < EXACT_BELOW:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n)[None] & 1)
        return float((np.abs(signs @ differences) >= observed).mean())
    signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (RESAMPLES, n))
    return float(((np.abs(signs @ differences) >= observed).sum() + 1) / (RESAMPLES + 1))


def sign_test_p(wins: int, losses: int) -> float:
    """Return the two-sided exact binomial p of `wins` against `losses`; ties are left out."""
    n = wins + losses
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(max(wins, losses), n + 1)) / 2**n
    return min(1.0, 2 * tail)


def _finite_mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return float(np.mean(finite)) if finite else math.nan
