"""Plain-torch definition of ray marching and compositing; letters and optics as in volume.py."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 14  # rays marched at a time, to bound the dense [rays, steps] table


def box_crossings(rays_o: Tensor, rays_d: Tensor) -> tuple[Tensor, Tensor]:
    """near and far [R] of the box [-1, 1]^3 by the slab method; far < near where the ray misses it."""
    tiny = torch.full_like(rays_d, 1e-12)
    inverse = 1 / torch.where(rays_d.abs() < 1e-12, tiny, rays_d)
    a, b = (-1 - rays_o) * inverse, (1 - rays_o) * inverse
    near = torch.minimum(a, b).amax(-1).clamp_min(0)
    return near, torch.maximum(a, b).amin(-1)


def march(
    rays_o: Tensor, rays_d: Tensor, occupancy: Tensor, step_size: float, jitter: Tensor, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """t [N], delta [N] and ray_offsets [R + 1]."""
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
        chosen = (k - (4096 * j[:, None]).long()) % stride == 0
        keep = (t < far[:, None]) & ((value == 1) | ((value == 2) & chosen))
        ts.append(t[keep])
        deltas.append(torch.where(value[keep] == 2, float(stride * step_size), float(step_size)).to(t.dtype))
        counts.append(keep.sum(1))
    count = torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64, device=device)
    return torch.cat(ts), torch.cat(deltas), torch.nn.functional.pad(count.cumsum(0), (1, 0))


def _transmittance(sigmas: Tensor, delta: Tensor, ray_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Light reaching each sample and its alpha, both [N], and the ray of each sample [N]; log-space running sums."""
    index = torch.arange(ray_offsets.shape[0] - 1, device=sigmas.device)
    rays = torch.repeat_interleave(index, ray_offsets.diff())
    depth = sigmas * delta
    before = depth.double().cumsum(0) - depth.double()  # [N] optical depth in front, over all rays
    first = ray_offsets[:-1].clamp(max=max(sigmas.shape[0] - 1, 0))
    start = before[first] if sigmas.shape[0] else before.new_zeros(index.shape)
    before = (before - start[rays]).to(depth.dtype)
    return torch.exp(-before), 1 - torch.exp(-depth), rays


def composite(
    sigmas: Tensor, values: Tensor, t: Tensor, delta: Tensor, ray_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [R, C], weights [N], opacity [R], depth [R]."""
    light, alpha, rays = _transmittance(sigmas, delta, ray_offsets)
    weights = light * alpha
    count = ray_offsets.shape[0] - 1
    out = values.new_zeros(count, values.shape[1]).index_add(0, rays, weights[:, None] * values)
    opacity = sigmas.new_zeros(count).index_add(0, rays, weights)
    depth = sigmas.new_zeros(count).index_add(0, rays, weights * t)
    return out, weights, opacity, depth


def visible(
    sigmas: Tensor, delta: Tensor, ray_offsets: Tensor, threshold: float, faint: float
) -> tuple[Tensor, Tensor]:
    """Indices [M] of the samples to keep, and their ray_offsets [R + 1]."""
    light, _, rays = _transmittance(sigmas, delta, ray_offsets)
    keep = (light >= threshold) & (sigmas * delta >= faint)
    counts = torch.zeros(ray_offsets.shape[0] - 1, dtype=torch.int64, device=sigmas.device)
    counts = counts.index_add(0, rays, keep.to(torch.int64))
    return keep.nonzero()[:, 0], torch.nn.functional.pad(counts.cumsum(0), (1, 0))
