"""Warp kernels behind texture of stages/kernels/raster.py: bilinear look-up, forward and backward.

Functions mirror those of cpu/texture.py, on contiguous tensors of one device. Gradients of texels are the same bytes
in every run; see cuda/sums.py.
"""

from __future__ import annotations

import torch
import warp as wp
from torch import Tensor

from stages.kernels.cuda import sums as cuda_sums
from stages.kernels.cuda.launch import launch

wp.set_module_options({"enable_backward": False, "fuse_fp": False})

f64 = wp.float64
ZERO = wp.constant(wp.float64(0.0))
HALF = wp.constant(wp.float64(0.5))
ONE = wp.constant(wp.float64(1.0))


@wp.func
def _texel(coordinate: wp.float64, size: int):
    """Lower texel, share of the upper one, and 1 inside, 0 where the coordinate is clamped or not finite."""
    at = coordinate * f64(size) - HALF
    if at >= f64(size - 1):
        share = ZERO
        if size > 1:
            share = ONE
        return wp.max(size - 2, 0), share, ZERO
    if at > ZERO:
        low = int(at)
        return low, at - f64(low), ONE
    return 0, ZERO, ZERO


@wp.kernel
def _look_up(image: wp.array3d(dtype=wp.float32), uv: wp.array(dtype=wp.vec2f), out: wp.array2d(dtype=wp.float32)):
    n, k = wp.tid()
    height, width = image.shape[0], image.shape[1]
    x, sx, _free_x = _texel(f64(uv[n][0]), width)
    y, sy, _free_y = _texel(ONE - f64(uv[n][1]), height)
    x1, y1 = wp.min(x + 1, width - 1), wp.min(y + 1, height - 1)
    top = f64(image[y, x, k]) * (ONE - sx) + f64(image[y, x1, k]) * sx
    bottom = f64(image[y1, x, k]) * (ONE - sx) + f64(image[y1, x1, k]) * sx
    out[n, k] = wp.float32(top * (ONE - sy) + bottom * sy)


def texture_forward(image: Tensor, uv: Tensor, out: Tensor) -> None:
    """Fill out [N, C] from image [H, W, C] at uv [N, 2], v up."""
    launch(_look_up, tuple(out.shape), (image, uv, out))


@wp.kernel
def _look_up_back(
    image: wp.array3d(dtype=wp.float32),
    uv: wp.array(dtype=wp.vec2f),
    grad: wp.array2d(dtype=wp.float32),
    peak: wp.array(dtype=wp.float32),
    total: wp.array(dtype=wp.int64),
    unit: wp.float64,
    grad_uv: wp.array(dtype=wp.vec2f),
):
    n = wp.tid()
    height, width, channels = image.shape[0], image.shape[1], image.shape[2]
    x, sx, free_x = _texel(f64(uv[n][0]), width)
    y, sy, free_y = _texel(ONE - f64(uv[n][1]), height)
    x1, y1 = wp.min(x + 1, width - 1), wp.min(y + 1, height - 1)
    gx, gy = f64(0.0), f64(0.0)
    for k in range(channels):
        g = f64(grad[n, k])
        cuda_sums.add(peak, total, unit, (y * width + x) * channels + k, g * (ONE - sx) * (ONE - sy))
        cuda_sums.add(peak, total, unit, (y * width + x1) * channels + k, g * sx * (ONE - sy))
        cuda_sums.add(peak, total, unit, (y1 * width + x) * channels + k, g * (ONE - sx) * sy)
        cuda_sums.add(peak, total, unit, (y1 * width + x1) * channels + k, g * sx * sy)
        a, b = f64(image[y, x, k]), f64(image[y, x1, k])
        c, d = f64(image[y1, x, k]), f64(image[y1, x1, k])
        gx += g * ((b - a) * (ONE - sy) + (d - c) * sy)
        gy += g * ((c - a) * (ONE - sx) + (d - b) * sx)
    grad_uv[n] = wp.vec2f(wp.float32(gx * f64(width) * free_x), wp.float32(-gy * f64(height) * free_y))


def texture_backward(image: Tensor, uv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients of image [H, W, C] and uv [N, 2]."""
    grad_uv = torch.empty_like(uv)

    def run(peak: Tensor, total: Tensor, unit: float) -> None:
        launch(_look_up_back, len(uv), (image, uv, grad, peak, total, unit, grad_uv))

    return cuda_sums.collect(image.shape, 4 * len(uv), image.device, run).float(), grad_uv
