"""How networks see a coloured point cloud, and the nearest colours of one.

K points. Networks see numbers in about [-1, 1], as Point-E scales them: xyz by the world's radius, colours 2 c - 1.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from stages.kernels.srgb import srgb_to_linear
from stages.mesh.cloud import Cloud

REACH = 0.85  # radius of the pocket world's objects


def cloud_of(channels: Tensor) -> Cloud:
    """Return the cloud of what a network made, [K, 6]; colours are rounded to bytes, as in Point-E."""
    colours = ((channels[:, 3:] + 1) * 127.5).clamp(0, 255).round() / 255
    return Cloud(channels[:, :3] * REACH, colours)


def channels_of(points: Tensor, colours: Tensor) -> Tensor:
    """Return [..., K, 6] for networks, of points [..., K, 3] and sRGB colours [..., K, 3] in [0, 1]."""
    return torch.cat([points / REACH, 2 * colours - 1], -1)


class NearestColours:
    """Linear colours of places in space: that of the nearest point of a cloud."""

    def __init__(self, cloud: Cloud) -> None:
        self.tree = cKDTree(cloud.points.cpu().double().numpy())
        self.colours = srgb_to_linear(cloud.colours.cpu().float())

    def __call__(self, points: Tensor) -> Tensor:
        """Return [N, 3] at points [N, 3], on their device."""
        _, nearest = self.tree.query(points.detach().cpu().double().numpy())
        return self.colours[torch.from_numpy(np.asarray(nearest, np.int64))].to(points)
