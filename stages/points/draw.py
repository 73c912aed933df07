"""Pictures of point clouds: squares of a few pixels, the nearest in front."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.cameras import Views, to_clip
from stages.mesh.cloud import Cloud


def draw_cloud(cloud: Cloud, views: Views, size: int, backdrop: float = 0.7) -> Tensor:
    """Return sRGB pictures [B, size, size, 3] in [0, 1] of a cloud.

    Args:
        views: B views.
        size: pixels a side; a point's square has a 40th of them.
        backdrop: sRGB grey.
    """
    clip = to_clip(cloud.points.float(), views)
    places = clip[..., :2] / clip[..., 3:]
    pixels = torch.stack([places[..., 0] + 1, 1 - places[..., 1]], -1) * (size / 2)  # [B, K, 2] column, row
    reach = max(1, size // 80)
    around = torch.arange(-reach, reach + 1, device=pixels.device)
    offsets = torch.cartesian_prod(around, around)
    pictures = []
    for pixel, depth in zip(pixels.floor().long(), clip[..., 3], strict=True):
        order = depth.argsort(descending=True, stable=True)
        where = (pixel[order, None] + offsets).flatten(0, 1)
        depths = torch.arange(len(order), device=pixel.device).repeat_interleave(len(offsets))
        inside = ((where >= 0) & (where < size)).all(-1)
        flat = where[inside, 1] * size + where[inside, 0]
        nearest = torch.full((size * size,), -1, device=pixel.device).scatter_reduce(0, flat, depths[inside], "amax")
        picture = torch.full((size * size, 3), backdrop, device=pixel.device)
        hit = nearest >= 0
        picture[hit] = cloud.colours[order].float()[nearest[hit]]
        pictures.append(picture.view(size, size, 3))
    return torch.stack(pictures)
