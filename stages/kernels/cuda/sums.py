"""Sums of terms from many threads whose bytes do not depend on the order in which the terms arrive.

Float atomics round after every addition, so a gradient that many pixels add to differs from run to run. Whole numbers
do not round: `collect` runs a kernel twice, the first time to find the largest magnitude that arrives at each place,
the second time to add each term there as a multiple of a tiny fraction of that magnitude, in 64 bits. (The idea is that
of reproducible summation: Demmel and Nguyen 2013, "Fast reproducible floating-point summation", with one bin.) With
2^24 terms a place still keeps 2^-36 of its largest term, a thousand times finer than float32.

A place at which something that is not finite arrives becomes nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import warp as wp
from torch import Tensor

PLACES_MAX = 1 << 31  # kernels number them with int32

INFINITE = wp.constant(wp.float32(math.inf))


@wp.func
def add(
    peak: wp.array(dtype=wp.float32),
    total: wp.array(dtype=wp.int64),
    unit: wp.float64,
    at: int,
    term: wp.float64,
):
    """Put one term to place `at`: measured while unit is 0, added afterwards."""
    if unit == wp.float64(0.0):
        size = wp.float32(wp.abs(term))
        if not wp.isfinite(size):
            size = INFINITE
        if size > peak[at]:  # a stale read costs an atomic, never a wrong result
            wp.atomic_max(peak, at, size)
    else:
        largest = peak[at]
        if largest > wp.float32(0.0) and wp.isfinite(largest):
            wp.atomic_add(total, at, wp.int64(wp.rint(term / wp.float64(largest) * unit)))


def collect(shape: tuple[int, ...], terms: int, device: torch.device, run: Callable[[Tensor, Tensor, float], None]):
    """Run a kernel that adds terms, and return the sums.

    Args:
        shape: of the result.
        terms: no place gets more than this many.
        run: launches the kernel on (peak, total, unit), which it hands to `add` with places of the flattened result;
            called twice, and the kernel must offer the same terms both times.
    Returns: float64 tensor of that shape.
    Raises: ValueError for a result too large to be numbered.
    """
    places = math.prod(shape)
    if places >= PLACES_MAX:
        raise ValueError(f"gradient: wanted fewer than {PLACES_MAX} values, got shape {list(shape)}")
    peak = torch.zeros(places, dtype=torch.float32, device=device)
    total = torch.zeros(places, dtype=torch.int64, device=device)
    unit = 2.0 ** (61 - math.ceil(math.log2(max(terms, 1))))
    run(peak, total, 0.0)
    run(peak, total, unit)
    return (total.double() * (peak.double() / unit)).reshape(shape)
