"""How far all of a system's objects together are from the ground truth's, as a judge sees them: a kernel distance.

Per-prompt scores see neither whether a system always draws the same, nor whether it draws what is no object at all;
Point-E has P-FID for that (arXiv 2212.08751, sec. 5.1: the Frechet distance of a PointNet++'s features). This is ours:
the squared maximum mean discrepancy (Gretton et al. 2012) of an independent CLIP's embeddings, one an object, under a
Gaussian kernel. It has no bias at few objects, where the Frechet distance has (Binkowski et al. 2018, arXiv 1801.01401;
Jayasumana et al. 2024, arXiv 2401.09603), and cannot be compared with P-FIDs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from benchmarks.quality.statistics import RESAMPLES, Interval


def distance(ours: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], seed: int = 0) -> Interval:
    """Return the squared discrepancy of two sets of objects of the same prompts, times 100, with its interval.

    0 in the mean where both are drawn alike, below 200 always. The bandwidth is the median distance between objects of
    the truth. Pairs of the same prompt are left out (Gretton et al. lemma 6), so that nothing is compared with itself.

    Args:
        ours: by prompt, unit embeddings [seeds, D].
        truth: the same of the ground truth.
    Returns: nan for fewer than three prompts that both have. The interval is a bootstrap over prompts, 95 %.
    """
    prompts = [prompt for prompt in ours if prompt in truth and len(ours[prompt])]
    if len(prompts) < 3:
        return Interval(np.nan, np.nan, np.nan, len(prompts))
    theirs = np.concatenate([truth[prompt] for prompt in prompts])
    apart = _squares(theirs, theirs)[np.triu_indices(len(theirs), 1)]
    width = max(float(np.median(apart)), 1e-12)

    def kernel(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> np.ndarray:
        """Mean over seeds of the kernel between the objects of each two prompts, [P, P]."""
        return np.array([[np.exp(-_squares(a[p], b[q]) / (2 * width)).mean() for q in prompts] for p in prompts])

    cross = kernel(ours, truth)
    terms = 100 * (kernel(ours, ours) + kernel(truth, truth) - cross - cross.T)
    np.fill_diagonal(terms, 0.0)
    drawn = np.random.default_rng(seed).integers(0, len(prompts), (RESAMPLES, len(prompts)))
    counts = np.stack([np.bincount(row, minlength=len(prompts)) for row in np.vstack([np.arange(len(prompts)), drawn])])
    counts = counts.astype(float)
    pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
    values = np.einsum("rp,pq,rq->r", counts, terms, counts, optimize=True) / np.maximum(pairs, 1)
    low, high = np.percentile(values[1:][pairs[1:] > 0], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high), len(prompts))


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances [N, M] of rows [N, D] and [M, D]."""
    return ((a[:, None] - b[None]) ** 2).sum(-1)
