"""numba kernels behind texture of stages/kernels/raster.py: bilinear look-up, forward and backward."""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit
from stages.kernels.cpu.threads import each

BLOCK = 1 << 14  # points a task looks up
BAND = 1 << 17  # texels times channels whose sums a task keeps, 1 MB


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
def _corners(uv, n, height, width, channels):
    """Places of the four texels around a point in the flat image, shares of the upper ones, and where they are free."""
    x, sx, free_x = _cell(uv[n, 0], width)
    y, sy, free_y = _cell(np.float64(1.0) - uv[n, 1], height)
    right = channels if x + 1 < width else 0
    below = width * channels if y + 1 < height else 0
    at = (y * width + x) * channels
    return at, at + right, at + below, at + right + below, sx, sy, free_x, free_y


@njit(cache=True, nogil=True)
def _look_up(task, image, height, width, uv, out):
    channels = out.shape[1]
    for n in range(task * BLOCK, min((task + 1) * BLOCK, len(uv))):
        a, b, c, d, sx, sy, _, _ = _corners(uv, n, height, width, channels)
        for k in range(channels):
            top = image[a + k] * (1.0 - sx) + image[b + k] * sx
            bottom = image[c + k] * (1.0 - sx) + image[d + k] * sx
            out[n, k] = top * (1.0 - sy) + bottom * sy


def texture_forward(image, uv, out):
    """Fill out [N, C] from image [H, W, C] at uv [N, 2], v up."""
    each(-(-len(uv) // BLOCK), _look_up, image.reshape(-1), *image.shape[:2], uv, out)


@njit(cache=True, nogil=True)
def _scatter_band(task, bands, height, width, uv, places, grad, out):
    """Gradient of the texels of some rows of the image, from every point that reads them, in the points' order."""
    channels = grad.shape[1]
    first, last = task * height // bands * width * channels, (task + 1) * height // bands * width * channels
    total = np.zeros(last - first, np.float64)
    for n in range(len(uv)):
        if places[n] < last and places[n] + width * channels >= first:
            a, b, c, d, sx, sy, _, _ = _corners(uv, n, height, width, channels)
            upper, lower = a >= first, c < last
            for k in range(channels):
                g = np.float64(grad[n, k])
                if upper:
                    total[a + k - first] += g * (1.0 - sx) * (1.0 - sy)
                    total[b + k - first] += g * sx * (1.0 - sy)
                if lower:
                    total[c + k - first] += g * (1.0 - sx) * sy
                    total[d + k - first] += g * sx * sy
    for i in range(len(total)):
        out[first + i] = total[i]


@njit(cache=True, nogil=True)
def _slopes(task, image, height, width, uv, grad, out, places):
    """Gradient of the points, and the places of their first texels."""
    channels = grad.shape[1]
    for n in range(task * BLOCK, min((task + 1) * BLOCK, len(uv))):
        a, b, c, d, sx, sy, free_x, free_y = _corners(uv, n, height, width, channels)
        gx = gy = 0.0
        for k in range(channels):
            g = np.float64(grad[n, k])
            p, q, r, s = image[a + k], image[b + k], image[c + k], image[d + k]
            gx += g * ((q - p) * (1.0 - sy) + (s - r) * sy)
            gy += g * ((r - p) * (1.0 - sx) + (s - q) * sx)
        out[n, 0], out[n, 1] = gx * width * free_x, -gy * height * free_y
        places[n] = a


def texture_backward(image, uv, grad):
    """Return gradients of image [H, W, C] and uv [N, 2]."""
    height, width, _ = image.shape
    bands = max(1, min(height, 16, -(-image.size // BAND)))  # by shape alone, so bytes repeat
    texels, points = np.empty(image.size, np.float32), np.empty(uv.shape, np.float32)
    places = np.empty(len(uv), np.int64)
    each(-(-len(uv) // BLOCK), _slopes, image.reshape(-1), height, width, uv, grad, points, places)
    each(bands, _scatter_band, bands, height, width, uv, places, grad, texels)
    return texels.reshape(image.shape), points
