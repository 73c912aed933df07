"""A coloured point cloud, as the points stage hands one on and PLY holds it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cloud:
    """Points and their colours.

    Args:
        points: [K, 3] world units.
        colours: [K, 3] sRGB in [0, 1].
    """

    points: Tensor
    colours: Tensor

    def __len__(self) -> int:
        return len(self.points)
