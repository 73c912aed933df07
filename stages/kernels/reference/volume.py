"""Plain-torch definition of ray marching and compositing; letters and optics as in volume.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 1 << 14  # rays marched at a time, to bound the dense [rays, steps] table
DIAGONAL = 3.4641018  # of the box [-1, 1]^3, rounded up: no unit ray is longer inside
SHORTEST = 1e-6  # length of a direction
OPAQUE = 1e4  # an optical depth: exp(-OPAQUE) is 0 in float64 too


def box_crossings(rays_o: Tensor, rays_d: Tensor) -> tuple[Tensor, Tensor]:
    """Return near and far [R] of the box [-1, 1]^3 by the slab method; far < near where the ray misses it.

    Both are 0 for a ray that is not finite or has no direction: inside the box it would have no end.
    """
    tiny = torch.full_like(rays_d, 1e-12)
    inverse = 1 / torch.where(rays_d.abs() < 1e-12, tiny, rays_d)
    a, b = (-1 - rays_o) * inverse, (1 - rays_o) * inverse
    near, length = torch.minimum(a, b).amax(-1).clamp_min(0), rays_d.norm(dim=-1)
    far = torch.minimum(torch.maximum(a, b).amin(-1), near + DIAGONAL / length)  # from far away, both are rounded
    valid = (length > SHORTEST) & length.isfinite() & near.isfinite()
    return torch.where(valid, near, 0), torch.where(valid, far, 0)


def march(
    rays_o: Tensor, rays_d: Tensor, occupancy: Tensor, step_size: float, jitter: Tensor, thin_stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return t [N], delta [N] and ray_offsets [R + 1]."""
    grid, device = occupancy.shape[0], rays_o.device
    ts, deltas, counts = [torch.zeros(0, device=device)], [torch.zeros(0, device=device)], []
    for low in range(0, rays_o.shape[0], CHUNK):
        o, d, j = (v[low : low + CHUNK] for v in (rays_o, rays_d, jitter))
        near, far = box_crossings(o, d)
        steps = int(((far - near).amax() / step_size).ceil().clamp_min(0)) + 1
        k = torch.arange(steps, device=device)
        t = near[:, None] + (k + j[:, None]) * step_size  # [r, K]
        position = o[:, None] + t[..., None] * d[:, None]  # [r, K, 3]
        cell = ((position + 1) * (0.5 * grid)).floor().long().clamp(0, grid - 1)
        value = occupancy[cell.unbind(-1)].to(torch.uint8)
        on_stride = (k - (4096 * j[:, None]).long()) % thin_stride == 0
        keep = (t < far[:, None]) & ((value == 1) | ((value == 2) & on_stride))
        ts.append(t[keep])
        deltas.append(torch.where(value[keep] == 2, float(thin_stride * step_size), float(step_size)).to(t.dtype))
        counts.append(keep.sum(1))
    count = torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64, device=device)
    return torch.cat(ts), torch.cat(deltas), torch.nn.functional.pad(count.cumsum(0), (1, 0))


def _in_front(values: Tensor, ray_offsets: Tensor, rays: Tensor) -> Tensor:
    """Sum [N], in float64, of the values [N] of the samples before each in its ray; as one sum over all rays."""
    before = values.double().cumsum(0) - values.double()
    first = ray_offsets[:-1].clamp(max=max(values.shape[0] - 1, 0))
    start = before[first] if values.shape[0] else before.new_zeros(first.shape)
    return before - start[rays]


def _transmittance(sigmas: Tensor, delta: Tensor, ray_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Transmittance and alpha of each sample, both [N], and the ray of each sample [N]; log-space running sums.

    What is nan stays in its ray, and what is opaque stays small: neither spoils the sum for the rays behind it.
    """
    index = torch.arange(ray_offsets.shape[0] - 1, device=sigmas.device)
    rays = torch.repeat_interleave(index, ray_offsets.diff())
    optical_depth = sigmas * delta
    is_nan = optical_depth.isnan()
    finite = torch.where(is_nan, 0, optical_depth).clamp(max=OPAQUE)
    before = _in_front(finite, ray_offsets, rays).to(optical_depth.dtype)
    transmittance = torch.where(_in_front(is_nan, ray_offsets, rays) > 0, math.nan, torch.exp(-before))
    return transmittance, 1 - torch.exp(-optical_depth), rays


def composite(
    sigmas: Tensor, values: Tensor, t: Tensor, delta: Tensor, ray_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return out [R, C], weights [N], opacity [R], depth [R]."""
    transmittance, alpha, rays = _transmittance(sigmas, delta, ray_offsets)
    weights = transmittance * alpha
    count = ray_offsets.shape[0] - 1
    out = values.new_zeros(count, values.shape[1]).index_add(0, rays, weights[:, None] * values)
    opacity = sigmas.new_zeros(count).index_add(0, rays, weights)
    depth = sigmas.new_zeros(count).index_add(0, rays, weights * t)
    return out, weights, opacity, depth


def cull(
    sigmas: Tensor, delta: Tensor, ray_offsets: Tensor, threshold: float, min_optical_depth: float
) -> tuple[Tensor, Tensor]:
    """Return indices [M] of the samples to keep, and their ray_offsets [R + 1]."""
    transmittance, _, rays = _transmittance(sigmas, delta, ray_offsets)
    keep = ~(transmittance < threshold) & ~(sigmas * delta < min_optical_depth)  # nan stays
    counts = torch.zeros(ray_offsets.shape[0] - 1, dtype=torch.int64, device=sigmas.device)
    counts = counts.index_add(0, rays, keep.to(torch.int64))
    return keep.nonzero()[:, 0], torch.nn.functional.pad(counts.cumsum(0), (1, 0))
