"""numba kernels behind stages/kernels/lattice.py: diffusion over the graph of a band."""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit
from stages.kernels.cpu.threads import each

BLOCK = 1 << 12  # vertices a task owns


@njit(cache=True, nogil=True)
def _prepare(block, neighbours, near, degree):
    """Neighbours with the number of rows for a missing one, and how many there are, of a block of rows."""
    n, directions = neighbours.shape
    for i in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
        count = 0
        for k in range(directions):
            j = neighbours[i, k]
            near[i, k] = n if j < 0 else j
            count += j >= 0
        degree[i] = count


@njit(cache=True, nogil=True)
def _iterate(block, near, degree, scale, keep, add, step, following, x, residual):
    """One Chebyshev iteration of a block of rows; `following` is the next one's step. A row more of both is zero."""
    n, directions = near.shape
    for i in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
        total = np.float32(0)
        for k in range(directions):
            total += step[near[i, k]]
        s = step[i]
        x[i] += s
        residual[i] -= s + scale * (degree[i] * s - total)
        following[i] = keep * s + add * residual[i]


def diffuse(neighbours, values, scale: float, pairs: list[tuple[float, float]], theta: float):
    """Chebyshev iteration for (I + scale (D - A)) x = values from x = 0; see reference_lattice.diffuse."""
    n, tasks = len(values), -(-len(values) // BLOCK)
    near, degree = np.empty(neighbours.shape, np.uint32), np.empty_like(values)  # unsigned: no look from the end
    each(tasks, _prepare, neighbours, near, degree)
    x, residual = np.zeros_like(values), values.copy()
    step, following = np.zeros(n + 1, values.dtype), np.zeros(n + 1, values.dtype)
    np.divide(values, np.float32(theta), out=step[:n])
    for keep, add in pairs:
        numbers = np.float32(scale), np.float32(keep), np.float32(add)
        each(tasks, _iterate, near, degree, *numbers, step, following, x, residual)
        step, following = following, step
    return x + step[:n]
