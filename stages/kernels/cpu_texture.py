"""numba kernels behind texture of stages/kernels/raster.py: bilinear look-up, forward and backward."""

from __future__ import annotations

import numpy as np
from numba import njit

from stages.kernels.cpu_raster import private_copies, reduced
from stages.kernels.threads import each

BLOCK = 1 << 14  # points a task looks up


@njit(cache=True, nogil=True, inline="always")
def _cell(coordinate, size):
    """Lower texel, share of the upper one, and 1.0 inside, 0.0 where the coordinate is clamped or not finite."""
    at = np.float64(coordinate) * size - 0.5
    if not at > 0.0:
        return 0, 0.0, 0.0
    if at >= size - 1:
        return max(size - 2, 0), (1.0 if size > 1 else 0.0), 0.0
    low = np.int64(at)
    return low, at - low, 1.0


@njit(cache=True, nogil=True)
def _look_up(task, image, uv, out):
    height, width, channels = image.shape
    for n in range(task * BLOCK, min((task + 1) * BLOCK, len(uv))):
        x, sx, _ = _cell(uv[n, 0], width)
        y, sy, _ = _cell(np.float64(1.0) - uv[n, 1], height)
        x1, y1 = min(x + 1, width - 1), min(y + 1, height - 1)
        for k in range(channels):
            top = image[y, x, k] * (1.0 - sx) + image[y, x1, k] * sx
            bottom = image[y1, x, k] * (1.0 - sx) + image[y1, x1, k] * sx
            out[n, k] = top * (1.0 - sy) + bottom * sy


def texture_forward(image, uv, out):
    """out [N, C] from image [H, W, C] at uv [N, 2], v up."""
    each(-(-len(uv) // BLOCK), _look_up, image, uv, out)


@njit(cache=True, nogil=True)
def _texture_backward(task, image, uv, grad, privates, grad_uv):
    (height, width, channels), tasks, private = image.shape, len(privates), privates[task]
    start, stop = task * len(uv) // tasks, (task + 1) * len(uv) // tasks
    for n in range(start, stop):
        x, sx, free_x = _cell(uv[n, 0], width)
        y, sy, free_y = _cell(np.float64(1.0) - uv[n, 1], height)
        x1, y1 = min(x + 1, width - 1), min(y + 1, height - 1)
        gx = gy = 0.0
        for k in range(channels):
            g = np.float64(grad[n, k])
            a, b, c, d = image[y, x, k], image[y, x1, k], image[y1, x, k], image[y1, x1, k]
            private[y * width + x, k] += g * (1.0 - sx) * (1.0 - sy)
            private[y * width + x1, k] += g * sx * (1.0 - sy)
            private[y1 * width + x, k] += g * (1.0 - sx) * sy
            private[y1 * width + x1, k] += g * sx * sy
            gx += g * ((b - a) * (1.0 - sy) + (d - c) * sy)
            gy += g * ((c - a) * (1.0 - sx) + (d - b) * sx)
        grad_uv[n, 0], grad_uv[n, 1] = gx * width * free_x, -gy * height * free_y


def texture_backward(image, uv, grad):
    """Gradients of image [H, W, C] and uv [N, 2]."""
    height, width, channels = image.shape
    private = np.zeros((private_copies(1, len(uv)), height * width, channels), np.float64)
    grad_uv = np.empty(uv.shape, np.float32)
    each(len(private), _texture_backward, image, uv, grad, private, grad_uv)
    return reduced(private, 1).reshape(image.shape), grad_uv
