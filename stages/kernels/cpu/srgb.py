"""numba kernels behind stages/kernels/srgb.py, value by value."""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit
from stages.kernels.cpu.threads import each
from stages.kernels.reference.srgb import KNEE

CHUNK = 1 << 16  # values a task takes


@njit(cache=True, nogil=True)
def _forward(task, linear, srgb):
    zero, line, factor, shift = np.float32(0), np.float32(12.92), np.float32(1.055), np.float32(0.055)
    for i in range(task * CHUNK, min(len(linear), (task + 1) * CHUNK)):
        x = linear[i]
        low = line * (zero if x < zero else x)
        srgb[i] = low if x <= np.float32(KNEE) else factor * srgb[i] - shift


@njit(cache=True, nogil=True)
def _backward(task, linear, srgb, grad, out):
    zero, one, line, shift = np.float32(0), np.float32(1), np.float32(12.92), np.float32(0.055)
    power = np.float32(1 / 2.4)
    for i in range(task * CHUNK, min(len(linear), (task + 1) * CHUNK)):
        x = linear[i]
        slope = line if x <= np.float32(KNEE) else power * (srgb[i] + shift) / x
        out[i] = grad[i] * (zero if (x < zero) | (x > one) else slope)


def srgb_forward(linear, srgb):
    """Turn the powers of the clamped values in `srgb` into the curve."""
    each(-(-linear.size // CHUNK), _forward, linear.reshape(-1), srgb.reshape(-1))


def srgb_backward(linear, srgb, grad, out):
    """Fill `out` with the gradient of linear."""
    each(-(-linear.size // CHUNK), _backward, *(array.reshape(-1) for array in (linear, srgb, grad, out)))
