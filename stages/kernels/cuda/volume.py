"""Ray marching and compositing in Warp, one thread a ray; definitions in reference/volume.py.

Marching and culling samples run twice, to count and to write, with a prefix sum between them. The sum's last value is
the length of what comes out, and reading it is the one wait for the device in each of the two ops: everything
downstream is allocated at that length. A fixed budget of samples would do without the wait, but would either waste the
field's evaluations or drop samples silently. Compositing never waits, and nothing here adds atomically.

Compiled without fused multiply-adds: distances then round as in the twin, and fall into the same cells.
"""

from __future__ import annotations

import torch
import warp as wp
from torch import Tensor

from stages.kernels.cuda.launch import launch
from stages.kernels.reference import volume as reference_volume

wp.set_module_options({"enable_backward": False, "fuse_fp": False})

DIAGONAL = wp.constant(wp.float32(reference_volume.DIAGONAL))
SHORTEST = wp.constant(wp.float32(reference_volume.SHORTEST))
TINY = wp.constant(wp.float32(1e-12))
FAR = wp.constant(wp.float32(1e30))


@wp.func
def _coordinate(position: float, half: float, grid: int) -> int:
    return wp.clamp(int(wp.floor((position + 1.0) * half)), 0, grid - 1)


@wp.kernel(grid_stride=False)
def _march(
    rays_o: wp.array2d(dtype=wp.float32),
    rays_d: wp.array2d(dtype=wp.float32),
    occupancy: wp.array3d(dtype=wp.uint8),
    step_size: float,
    jitter: wp.array(dtype=wp.float32),
    thin_stride: int,
    counts: wp.array(dtype=wp.int64),
    offsets: wp.array(dtype=wp.int64),
    t_out: wp.array(dtype=wp.float32),
    delta_out: wp.array(dtype=wp.float32),
):
    """Counts into counts[r] where it is not empty, else writes from offsets[r]."""
    r = wp.tid()
    grid = occupancy.shape[0]
    half = 0.5 * float(grid)
    o = wp.vec3(rays_o[r, 0], rays_o[r, 1], rays_o[r, 2])
    d = wp.vec3(rays_d[r, 0], rays_d[r, 1], rays_d[r, 2])
    near, far = float(0.0), float(FAR)
    for axis in range(3):
        inverse = 1.0 / wp.where(wp.abs(d[axis]) < TINY, TINY, d[axis])
        a, b = (-1.0 - o[axis]) * inverse, (1.0 - o[axis]) * inverse
        near, far = wp.max(near, wp.min(a, b)), wp.min(far, wp.max(a, b))
    j = jitter[r]
    first = int(4096.0 * j)
    length = wp.length(d)
    steps = int(0)  # a ray that is not finite or has no direction would have no end inside the box
    if length > SHORTEST and wp.isfinite(length) and wp.isfinite(o):
        steps = int(DIAGONAL / (length * step_size)) + 2
        far = wp.min(far, near + DIAGONAL / length)  # from far away, both are rounded
    at = wp.int64(0)
    if counts.shape[0] == 0:
        at = offsets[r]
    count = wp.int64(0)
    for k in range(steps):
        t = near + (float(k) + j) * step_size
        if not (t < far):
            break
        x = _coordinate(o[0] + t * d[0], half, grid)
        y = _coordinate(o[1] + t * d[1], half, grid)
        z = _coordinate(o[2] + t * d[2], half, grid)
        value = int(occupancy[x, y, z])
        if value == 1 or (value == 2 and (k - first) % thin_stride == 0):
            if counts.shape[0] == 0:
                t_out[int(at + count)] = t
                delta_out[int(at + count)] = wp.where(value == 1, step_size, step_size * float(thin_stride))
            count += wp.int64(1)
    if counts.shape[0] > 0:
        counts[r] = count


@wp.kernel(grid_stride=False)
def _weights(
    sigmas: wp.array(dtype=wp.float32),
    t: wp.array(dtype=wp.float32),
    delta: wp.array(dtype=wp.float32),
    offsets: wp.array(dtype=wp.int64),
    weights: wp.array(dtype=wp.float32),
    opacity: wp.array(dtype=wp.float32),
    depth: wp.array(dtype=wp.float32),
):
    r = wp.tid()
    transmittance, weight_sum, depth_sum = float(1.0), float(0.0), float(0.0)
    for i in range(int(offsets[r]), int(offsets[r + 1])):
        one_minus_alpha = wp.exp(-sigmas[i] * delta[i])
        w = transmittance * (1.0 - one_minus_alpha)
        transmittance *= one_minus_alpha
        weights[i] = w
        weight_sum += w
        depth_sum += w * t[i]
    opacity[r] = weight_sum
    depth[r] = depth_sum


@wp.kernel(grid_stride=False)
def _blend(
    values: wp.array2d(dtype=wp.float32),
    weights: wp.array(dtype=wp.float32),
    offsets: wp.array(dtype=wp.int64),
    out: wp.array2d(dtype=wp.float32),
):
    """One thread a ray and channel: the sum stays in a register whatever the number of channels."""
    r, c = wp.tid()
    total = float(0.0)
    for i in range(int(offsets[r]), int(offsets[r + 1])):
        total += weights[i] * values[i, c]
    out[r, c] = total


@wp.kernel(grid_stride=False)
def _composite_backward(
    sigmas: wp.array(dtype=wp.float32),
    values: wp.array2d(dtype=wp.float32),
    t: wp.array(dtype=wp.float32),
    delta: wp.array(dtype=wp.float32),
    offsets: wp.array(dtype=wp.int64),
    g_out: wp.array2d(dtype=wp.float32),
    g_weights: wp.array(dtype=wp.float32),
    g_opacity: wp.array(dtype=wp.float32),
    g_depth: wp.array(dtype=wp.float32),
    gains: wp.array(dtype=wp.float32),
    g_sigmas: wp.array(dtype=wp.float32),
    g_values: wp.array2d(dtype=wp.float32),
):
    """d L / d w_i = a_i gives d L / d sigma_k = delta_k (T_{k+1} a_k - sum_{i>k} w_i a_i), walked from the far end.

    An upstream gradient whose array is empty is zero. gains [N] holds w a between the two walks.
    """
    r = wp.tid()
    low, high = int(offsets[r]), int(offsets[r + 1])
    g_ray_opacity, g_ray_depth = float(0.0), float(0.0)
    if g_opacity.shape[0] > 0:
        g_ray_opacity = g_opacity[r]
    if g_depth.shape[0] > 0:
        g_ray_depth = g_depth[r]
    transmittance = float(1.0)
    for i in range(low, high):
        one_minus_alpha = wp.exp(-sigmas[i] * delta[i])
        w = transmittance * (1.0 - one_minus_alpha)
        transmittance *= one_minus_alpha
        a = g_ray_opacity + g_ray_depth * t[i]
        if g_weights.shape[0] > 0:
            a += g_weights[i]
        for c in range(values.shape[1]):
            up = float(0.0)
            if g_out.shape[0] > 0:
                up = g_out[r, c]
            a += up * values[i, c]
            g_values[i, c] = w * up
        g_sigmas[i] = transmittance * a
        gains[i] = w * a
    suffix_sum = float(0.0)
    for back in range(high - low):
        i = high - 1 - back
        g_sigmas[i] = delta[i] * (g_sigmas[i] - suffix_sum)
        suffix_sum += gains[i]


@wp.kernel(grid_stride=False)
def _cull(
    sigmas: wp.array(dtype=wp.float32),
    delta: wp.array(dtype=wp.float32),
    offsets: wp.array(dtype=wp.int64),
    threshold: float,
    min_optical_depth: float,
    counts: wp.array(dtype=wp.int64),
    offsets_out: wp.array(dtype=wp.int64),
    index: wp.array(dtype=wp.int64),
):
    """Counts into counts[r] where it is not empty, else writes from offsets_out[r]."""
    r = wp.tid()
    at = wp.int64(0)
    if counts.shape[0] == 0:
        at = offsets_out[r]
    accumulated_depth = float(0.0)
    count = wp.int64(0)
    for i in range(int(offsets[r]), int(offsets[r + 1])):
        if wp.exp(-accumulated_depth) < threshold:
            break
        optical_depth = sigmas[i] * delta[i]
        accumulated_depth += optical_depth
        if not (optical_depth < min_optical_depth):  # nan stays
            if counts.shape[0] == 0:
                index[int(at + count)] = wp.int64(i)
            count += wp.int64(1)
    if counts.shape[0] > 0:
        counts[r] = count


def _ends(counts: Tensor) -> tuple[Tensor, int]:
    """Offsets [R + 1] of runs of so many, and their sum, for which this waits."""
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return offsets, int(offsets[-1])


def march(
    rays_o: Tensor, rays_d: Tensor, occupancy: Tensor, step_size: float, jitter: Tensor, thin_stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return t [N], delta [N] and ray_offsets [R + 1]. Waits once, for N."""
    rays = rays_o.shape[0]
    ray = (rays_o, rays_d, occupancy.to(torch.uint8), step_size, jitter, thin_stride)
    none, no_counts = rays_o.new_empty(0), torch.empty(0, dtype=torch.int64, device=rays_o.device)
    counts = torch.empty(rays, dtype=torch.int64, device=rays_o.device)
    launch(_march, rays, (*ray, counts, no_counts, none, none))
    offsets, total = _ends(counts)
    t, delta = rays_o.new_empty(total), rays_o.new_empty(total)
    launch(_march, rays if total else 0, (*ray, no_counts, offsets, t, delta))
    return t, delta, offsets


def composite(sigmas: Tensor, values: Tensor, t: Tensor, delta: Tensor, ray_offsets: Tensor) -> tuple[Tensor, ...]:
    """Return out [R, C], weights [N], opacity [R], depth [R]."""
    rays, channels = ray_offsets.shape[0] - 1, values.shape[1]
    out, weights = values.new_empty(rays, channels), torch.empty_like(t)
    opacity, depth = t.new_empty(rays), t.new_empty(rays)
    launch(_weights, rays, (sigmas, t, delta, ray_offsets, weights, opacity, depth))
    launch(_blend, (rays, channels), (values, weights, ray_offsets, out))
    return out, weights, opacity, depth


def composite_backward(
    sigmas: Tensor, values: Tensor, t: Tensor, delta: Tensor, ray_offsets: Tensor, g_out, g_weights, g_opacity, g_depth
) -> tuple[Tensor, Tensor]:
    """Return gradients in sigmas and values; any of the four upstream gradients may be None."""
    none = t.new_empty(0)
    g_sigmas, gains, g_values = torch.empty_like(t), torch.empty_like(t), values.new_empty(values.shape)
    g_out = none.view(0, 0) if g_out is None else g_out
    others = (none if g is None else g for g in (g_weights, g_opacity, g_depth))
    arguments = (sigmas, values, t, delta, ray_offsets, g_out, *others, gains, g_sigmas, g_values)
    launch(_composite_backward, ray_offsets.shape[0] - 1, arguments)
    return g_sigmas, g_values


def cull(
    sigmas: Tensor, delta: Tensor, ray_offsets: Tensor, threshold: float, min_optical_depth: float
) -> tuple[Tensor, Tensor]:
    """Return indices [M] of the samples to keep, and their ray_offsets [R + 1]. Waits once, for M."""
    rays, device = ray_offsets.shape[0] - 1, sigmas.device
    none, counts = (torch.empty(n, dtype=torch.int64, device=device) for n in (0, rays))
    inputs = (sigmas, delta, ray_offsets, threshold, min_optical_depth)
    launch(_cull, rays, (*inputs, counts, none, none))
    offsets_out, total = _ends(counts)
    index = torch.empty(total, dtype=torch.int64, device=device)
    launch(_cull, rays if total else 0, (*inputs, none, offsets_out, index))
    return index, offsets_out
