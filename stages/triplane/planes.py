"""Tri-planes: three feature images of an object, read at points by projection, and their roll-out for convolutions.

Letters: B objects, C channels, R side of a plane in cells, N points. Planes are [B, 3, C, R, R] in the order XY, XZ,
YZ; columns run along the first letter's axis, rows along the second's, from -BOX to BOX. So columns of XY and XZ share
x, rows of XY and columns of YZ share y, rows of XZ and YZ share z: what the 3D-aware convolution (unet.py) relies on.
Source: Rodin (arXiv 2212.06135) sec. 3.1, 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BOX = 0.9  # half the side of the box that planes cover, world units; objects reach 0.85
AXES = ((0, 1), (0, 2), (1, 2))  # column and row axis of XY, XZ, YZ


def roll_out(planes: Tensor) -> Tensor:
    """Lay planes [B, 3, C, R, R] beside each other: [B, C, R, 3 R], XY | XZ | YZ."""
    return torch.cat(planes.unbind(1), -1)


def roll_up(rolled: Tensor) -> Tensor:
    """Return the planes [B, 3, C, R, R] of a roll-out [B, C, R, 3 R]; inverse of roll_out."""
    if rolled.ndim != 4 or rolled.shape[-1] != 3 * rolled.shape[-2]:
        raise ValueError(f"rolled: wanted [B, C, R, 3 R], got {list(rolled.shape)}")
    return torch.stack(rolled.chunk(3, -1), 1)


def resize(planes: Tensor, side: int) -> Tensor:
    """Return planes [B, 3, C, R, R] at `side` cells: means of cells downwards, bilinear upwards."""
    batch, three, channels, size, _ = planes.shape
    if size == side:
        return planes
    flat = planes.reshape(batch * three, channels, size, size)
    if size % side == 0:
        flat = F.avg_pool2d(flat, size // side)
    else:
        flat = F.interpolate(flat, (side, side), mode="bilinear", align_corners=False, antialias=side < size)
    return flat.reshape(batch, three, channels, side, side)


def features_at(planes: Tensor, points: Tensor) -> Tensor:
    """Return the sum of the three bilinear samples at points; outside of the planes, at their border.

    Args:
        planes: [B, 3, C, R, R].
        points: [B, N, 3] in world units.
    Returns: [B, N, C].
    Source: Rodin sec. 3.1.
    """
    batch, _, channels, size, _ = planes.shape
    x = points.unbind(-1)  # an index by a list would be copied to the device
    grid = torch.stack([torch.stack([x[i], x[j]], -1) for i, j in AXES], 1) / BOX  # [B, 3, N, 2]
    count = points.shape[1]
    flat = planes.reshape(3 * batch, channels, size, size)
    samples = F.grid_sample(flat, grid.reshape(3 * batch, 1, count, 2), padding_mode="border", align_corners=False)
    return samples.reshape(batch, 3, channels, count).sum(1).transpose(1, 2)
