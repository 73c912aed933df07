"""Plain-torch twin of stages/kernels/lattice.py: the definition, any device and floating dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chebyshev(strength: float, tolerance: float) -> tuple[list[tuple[float, float]], float]:
    """Return coefficients of the Chebyshev iteration for a spectrum in [1, 1 + 2 strength] (Saad 2003, alg. 12.1).

    Returns: pairs (factor of the last step, factor of the residual), enough of them that the error of every eigenvector
        falls below `tolerance`, and the divisor of the first step.
    """
    low, high = 1.0, 1.0 + 2.0 * strength
    theta, delta = (high + low) / 2, (high - low) / 2
    root = math.sqrt(high / low)
    count = math.ceil(math.log(2 / tolerance) / math.log((root + 1) / (root - 1)))
    sigma = theta / delta
    rho, pairs = 1 / sigma, []
    for _ in range(count - 1):
        following = 1 / (2 * sigma - rho)
        pairs.append((following * rho, 2 * following / delta))
        rho = following
    return pairs, theta


def diffuse(values: Tensor, neighbours: Tensor, strength: float, tolerance: float) -> Tensor:
    """See stages.kernels.lattice.diffuse."""
    pairs, theta = chebyshev(strength, tolerance)
    present = neighbours >= 0
    index, degree = neighbours.clamp_min(0).long(), present.sum(1).to(values.dtype)
    scale = strength / neighbours.shape[1]

    def applied(x: Tensor) -> Tensor:
        return x + scale * (degree * x - torch.where(present, x[index], 0).sum(1))

    x, residual, step = torch.zeros_like(values), values, values / theta
    for keep, add in pairs:
        x, residual = x + step, residual - applied(step)
        step = keep * step + add * residual
    return x + step
