"""The torch twin of grids.py: its definition, on any device and in float32 or float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 8  # raw density, albedo (3), normal (3), one unused: a cell is one vector register
EXTENT = 0.9  # a grid spans [-EXTENT, EXTENT]^3 in its object's own coordinates; its object is in that cube's ball
DENSITY = 12.0  # optical depth of one unit of length at activated density 1
FAINTEST = -9.0  # raw density below which a place counts as empty
CLEAR = 1e-3  # transmittance at which a ray ends


def activated(raw: Tensor) -> Tensor:
    """Density of a raw value: exp(x) below 0, 1 + x above; 0 below FAINTEST."""
    return torch.where(raw < FAINTEST, 0.0, torch.where(raw < 0, raw.clamp_max(0).exp(), 1 + raw.clamp_min(0)))


def chords(origins: Tensor, directions: Tensor, placement: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [B, R, K] at which rays enter and leave each object's sphere; equal where they miss it."""
    offset = origins[:, :, None] - placement[:, None, :, 1:]  # [B, R, K, 3]
    along = (offset * directions[:, :, None]).sum(-1)
    inside = along**2 - (offset**2).sum(-1) + (EXTENT * placement[:, None, :, 0]) ** 2
    half = inside.clamp_min(0).sqrt()
    return (-along - half).clamp_min(0), (-along + half).clamp_min(0)


def composite_grids(
    grids: Tensor, index: Tensor, placement: Tensor, origins: Tensor, directions: Tensor, steps: int, jitter: Tensor
) -> Tensor:
    """See grids.py; one sample of every ray at a time."""
    present = index >= 0  # [B, K]
    enter, leave = chords(origins, directions, placement)
    hit = (leave > enter) & present[:, None]
    first = torch.where(hit, enter, torch.inf).amin(-1)
    last = torch.where(hit, leave, -torch.inf).amax(-1)  # [B, R]
    scale = torch.where(present, placement[..., 0], torch.inf).amin(-1)  # [B]
    length = (2 * EXTENT / steps) * scale  # [B]
    light = torch.ones_like(first)
    out = origins.new_zeros(*first.shape, CHANNELS)
    reach = torch.where(last > first, (last - first) / length[:, None], 0.0)
    count = int(torch.ceil(reach.max())) if reach.numel() else 0
    for d in range(count):
        distance = torch.where(last > first, first, 0.0) + (d + jitter) * length[:, None]
        live = (distance < last) & (light >= CLEAR)
        points = origins + distance[..., None] * directions
        density, values = 0.0, 0.0
        for k in range(index.shape[1]):
            near = (points - placement[:, None, k, 1:]) / placement[:, None, k, :1]
            inside = ((near**2).sum(-1) < EXTENT**2) & present[:, k, None] & live
            cells = grids[index[:, k].clamp_min(0).long()].permute(0, 4, 1, 2, 3)  # [B, C, x, y, z]
            where = near[:, :, None, None].flip(-1) / EXTENT
            raw = F.grid_sample(cells, where, align_corners=False, padding_mode="border")[..., 0, 0].transpose(1, 2)
            object_density = torch.where(inside, activated(raw[..., 0]) / placement[:, None, k, 0], 0.0)
            density, values = density + object_density, values + object_density[..., None] * raw
        optical = DENSITY * length[:, None] * density
        alpha = 1 - torch.exp(-optical)
        mean = values / torch.where(density > 0, density, 1.0)[..., None]
        weight = light * alpha
        rest = torch.stack([torch.ones_like(distance), distance], -1)
        out = out + weight[..., None] * torch.cat([mean[..., 1:7], rest], -1)
        light = light * (1 - alpha)
    return out
