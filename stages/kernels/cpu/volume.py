"""Ray marching and compositing on the CPU (numba), one pass per ray; definitions in reference/volume.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stages.kernels.cpu.jit import njit
from stages.kernels.cpu.threads import each
from stages.kernels.reference.volume import DIAGONAL, SHORTEST

CHUNK = 1024  # rays per task


@njit(inline="always")
def _crossings(o, d):
    """near and far, both 0 for a ray that is not finite or has no direction: inside the box it would have no end."""
    length = np.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
    valid = np.float32(SHORTEST) < length < np.float32(np.inf)
    if not (valid and np.isfinite(o[0]) and np.isfinite(o[1]) and np.isfinite(o[2])):
        return np.float32(0), np.float32(0)
    near, far = np.float32(0), np.float32(np.inf)
    one = np.float32(1)
    for axis in range(3):
        di = d[axis]
        if abs(di) < np.float32(1e-12):
            di = np.float32(1e-12)
        inverse = one / di
        a, b = (-one - o[axis]) * inverse, (one - o[axis]) * inverse
        near, far = max(near, min(a, b)), min(far, max(a, b))
    return near, min(far, near + np.float32(DIAGONAL) / length)  # from far away, both are rounded


@njit(inline="always")
def _span(o, d, low, high, half, near, far, step_size):
    """The first step and the distance that the steps end at, of those that can fall into cells low .. high."""
    first, last, margin = near, far, np.float32(2) * step_size  # to spare: products are rounded
    for axis in range(3):
        if abs(d[axis]) > np.float32(1e-3):
            inverse = np.float32(1) / d[axis]
            a = (np.float32(low[axis]) / half - np.float32(1) - o[axis]) * inverse
            b = (np.float32(high[axis] + 1) / half - np.float32(1) - o[axis]) * inverse
            first, last = max(first, min(a, b) - margin), min(last, max(a, b) + margin)
    if not first < last:
        return 0, near
    return max(0, np.int64((first - near) / step_size) - 1), last


@njit(inline="always")
def _cell(position, half, grid):
    return min(max(np.int64(np.floor((position + np.float32(1)) * half)), 0), grid - 1)


@njit(cache=True, nogil=True)
def _march(
    chunk, rays_o, rays_d, occupancy, low, high, step_size, jitter, thin_stride, offsets, t_out, delta_out, write
):
    """Counts into offsets[r + 1], or writes from offsets[r]; [low, high] bounds the occupied cells per axis."""
    grid = occupancy.shape[0]
    half = np.float32(0.5 * grid)
    rays = rays_o.shape[0]
    for r in range(chunk * CHUNK, min(rays, (chunk + 1) * CHUNK)):
        near, far = _crossings(rays_o[r], rays_d[r])
        ox, oy, oz = rays_o[r, 0], rays_o[r, 1], rays_o[r, 2]
        dx, dy, dz = rays_d[r, 0], rays_d[r, 1], rays_d[r, 2]
        count, j = 0, jitter[r]
        first = np.int64(np.float32(4096) * j)
        k, end = _span(rays_o[r], rays_d[r], low, high, half, near, far, step_size)
        k -= 1
        while True:
            k += 1
            t = near + (np.float32(k) + j) * step_size
            if not t < end:
                break
            x = _cell(ox + t * dx, half, grid)
            if x < low[0] or x > high[0]:
                continue
            y = _cell(oy + t * dy, half, grid)
            if y < low[1] or y > high[1]:
                continue
            z = _cell(oz + t * dz, half, grid)
            value = occupancy[x, y, z]
            if value == 1 or (value == 2 and (k - first) % thin_stride == 0):
                if write:
                    t_out[offsets[r] + count] = t
                    delta_out[offsets[r] + count] = step_size if value == 1 else step_size * np.float32(thin_stride)
                count += 1
        if not write:
            offsets[r + 1] = count


@njit(cache=True, nogil=True)
def _composite(chunk, sigmas, values, t, delta, offsets, out, weights, opacity, depth):
    rays, channels = out.shape
    one = np.float32(1)
    for r in range(chunk * CHUNK, min(rays, (chunk + 1) * CHUNK)):
        transmittance, weight_sum, depth_sum = one, np.float32(0), np.float32(0)
        for i in range(offsets[r], offsets[r + 1]):
            one_minus_alpha = np.exp(-sigmas[i] * delta[i])
            w = transmittance * (one - one_minus_alpha)
            transmittance *= one_minus_alpha
            weights[i] = w
            weight_sum += w
            depth_sum += w * t[i]
            for c in range(channels):
                out[r, c] += w * values[i, c]
        opacity[r], depth[r] = weight_sum, depth_sum


@njit(cache=True, nogil=True)
def _composite_backward(
    chunk, sigmas, values, t, delta, offsets, g_out, g_weights, g_opacity, g_depth, g_sigmas, g_values
):  # fmt: skip
    """d L / d w_i = a_i gives d L / d sigma_k = delta_k (T_{k+1} a_k - sum_{i>k} w_i a_i), walked from the far end."""
    rays, channels = g_out.shape
    one = np.float32(1)
    for r in range(chunk * CHUNK, min(rays, (chunk + 1) * CHUNK)):
        transmittance = one
        for i in range(offsets[r], offsets[r + 1]):
            one_minus_alpha = np.exp(-sigmas[i] * delta[i])
            w = transmittance * (one - one_minus_alpha)
            transmittance *= one_minus_alpha
            a = g_weights[i] + g_opacity[r] + g_depth[r] * t[i]
            for c in range(channels):
                a += g_out[r, c] * values[i, c]
                g_values[i, c] = w * g_out[r, c]
            g_sigmas[i] = transmittance * a  # the first term; w a waits in g_weights for the way back
            g_weights[i] = w * a
        suffix_sum = np.float32(0)
        for i in range(offsets[r + 1] - 1, offsets[r] - 1, -1):
            g_sigmas[i] = delta[i] * (g_sigmas[i] - suffix_sum)
            suffix_sum += g_weights[i]


@njit(cache=True, nogil=True)
def _cull(chunk, sigmas, delta, offsets, threshold, min_optical_depth, offsets_out, index, write):
    """Counts into offsets_out[r + 1], or writes index from offsets_out[r]."""
    rays = offsets.shape[0] - 1
    for r in range(chunk * CHUNK, min(rays, (chunk + 1) * CHUNK)):
        accumulated_depth, count = np.float32(0), 0
        for i in range(offsets[r], offsets[r + 1]):
            if np.exp(-accumulated_depth) < threshold:
                break
            optical_depth = sigmas[i] * delta[i]
            accumulated_depth += optical_depth
            if not optical_depth < min_optical_depth:  # nan stays
                if write:
                    index[offsets_out[r] + count] = i
                count += 1
        if not write:
            offsets_out[r + 1] = count


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def march(
    rays_o: Tensor, rays_d: Tensor, occupancy: Tensor, step_size: float, jitter: Tensor, thin_stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return t [N], delta [N] and ray_offsets [R + 1]."""
    cells = _array(occupancy.to(torch.uint8))
    occupied = [np.flatnonzero(cells.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    offsets = np.zeros(rays_o.shape[0] + 1, dtype=np.int64)
    if not occupied[0].size:
        return torch.zeros(0), torch.zeros(0), torch.from_numpy(offsets)
    low, high = (np.array([u[k] for u in occupied], dtype=np.int64) for k in (0, -1))
    rays = (
        _array(rays_o),
        _array(rays_d),
        cells,
        low,
        high,
        np.float32(step_size),
        _array(jitter),
        thin_stride,
        offsets,
    )
    none = np.zeros(0, dtype=np.float32)
    tasks = -(-len(rays_o) // CHUNK)
    each(tasks, _march, *rays, none, none, False)
    np.cumsum(offsets, out=offsets)
    t, delta = torch.empty(int(offsets[-1])), torch.empty(int(offsets[-1]))
    each(tasks, _march, *rays, t.numpy(), delta.numpy(), True)
    return t, delta, torch.from_numpy(offsets)


def composite(sigmas: Tensor, values: Tensor, t: Tensor, delta: Tensor, ray_offsets: Tensor) -> tuple[Tensor, ...]:
    """Return out [R, C], weights [N], opacity [R], depth [R]."""
    rays = ray_offsets.shape[0] - 1
    out, weights = torch.zeros(rays, values.shape[1]), torch.empty_like(t)
    opacity, depth = torch.empty(rays), torch.empty(rays)
    inputs = (_array(v) for v in (sigmas, values, t, delta, ray_offsets))
    each(-(-rays // CHUNK), _composite, *inputs, *(v.numpy() for v in (out, weights, opacity, depth)))
    return out, weights, opacity, depth


def composite_backward(
    sigmas: Tensor, values: Tensor, t: Tensor, delta: Tensor, ray_offsets: Tensor, g_out, g_weights, g_opacity, g_depth
) -> tuple[Tensor, Tensor]:
    """Return gradients in sigmas and values; any of the four upstream gradients may be None."""
    rays = ray_offsets.shape[0] - 1
    g_sigmas, g_values = torch.empty_like(t), torch.empty(values.shape)
    g_out = torch.zeros(rays, values.shape[1]) if g_out is None else g_out
    g_weights = torch.zeros_like(t) if g_weights is None else g_weights.clone()  # the kernel writes into it
    g_opacity = torch.zeros(rays) if g_opacity is None else g_opacity
    g_depth = torch.zeros(rays) if g_depth is None else g_depth
    inputs = (sigmas, values, t, delta, ray_offsets, g_out, g_weights, g_opacity, g_depth)
    arrays = (*(_array(v) for v in inputs), g_sigmas.numpy(), g_values.numpy())
    each(-(-rays // CHUNK), _composite_backward, *arrays)
    return g_sigmas, g_values


def cull(
    sigmas: Tensor, delta: Tensor, ray_offsets: Tensor, threshold: float, min_optical_depth: float
) -> tuple[Tensor, Tensor]:
    """Return indices [M] of the samples to keep, and their ray_offsets [R + 1]."""
    offsets_out = np.zeros(ray_offsets.shape[0], dtype=np.int64)
    inputs = (
        *(_array(v) for v in (sigmas, delta, ray_offsets)),
        np.float32(threshold),
        np.float32(min_optical_depth),
        offsets_out,
    )
    tasks = -(-(len(offsets_out) - 1) // CHUNK)
    each(tasks, _cull, *inputs, np.zeros(0, dtype=np.int64), False)
    np.cumsum(offsets_out, out=offsets_out)
    index = torch.empty(int(offsets_out[-1]), dtype=torch.int64)
    each(tasks, _cull, *inputs, index.numpy(), True)
    return index, torch.from_numpy(offsets_out)
