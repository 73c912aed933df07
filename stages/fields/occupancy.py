"""Occupancy grid over the box [-1, 1]^3: which cells hold density worth sampling.

Source: Instant NGP, app. C, and nerfacc's OccGridEstimator: a decayed maximum of densities at random points of the
cells, refreshed every few steps, everywhere at first and partly later. A grid that starts empty would never be visited
again, so it starts full.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class OccupancySettings(BaseModel):
    """The grid that lets rays skip empty space."""

    model_config = ConfigDict(extra="forbid")

    resolution: int = Field(64, ge=8, le=256, description="cells a side; 64 matches the sampling step of 64x64 renders")
    every: int = Field(16, ge=1, description="steps between refreshes")
    warmup: float = Field(
        0.32, ge=0, le=1, description="share of the stage, from its start, in which a refresh evaluates every cell"
    )
    share: float = Field(0.25, gt=0, le=1, description="share of the empty cells that a later refresh evaluates")
    decay: float = Field(0.8, gt=0, lt=1, description="factor on the remembered density at each refresh")
    threshold: float = Field(0.01, gt=0, description="optical depth of one sampling step above which a cell counts")
    thin: float = Field(0.05, ge=0, description="optical depth of one step below which a cell is sampled coarsely")
    dilate: int = Field(1, ge=0, le=4, description="cells added around the occupied ones, where a surface may grow")


class OccupancyGrid(nn.Module):
    """State, indexed [x, y, z]: remembered densities [G, G, G], and cells as uint8: 0 empty, 1 occupied, 2 thin."""

    def __init__(self, settings: OccupancySettings) -> None:
        super().__init__()
        self.settings = settings
        g = settings.resolution
        self.register_buffer("density", torch.zeros(g, g, g))
        self.register_buffer("cells", torch.ones(g, g, g, dtype=torch.uint8))

    @torch.no_grad()
    def update(
        self,
        density: Callable[[Tensor], Tensor],
        step: int,
        share: float,
        generator: torch.Generator,
        step_size: float,
    ) -> None:
        """Refresh the grid when `step` is a multiple of `every`; otherwise nothing happens and nothing is drawn.

        Args:
            density: sigma [N] at world points [N, 3].
            step: of the stage, from 0.
            share: of the stage done, in [0, 1].
            generator: CPU, places the points within the cells.
            step_size: world length of a sampling interval, which turns a density into an optical depth.
        """
        s = self.settings
        if step % s.every:
            return
        g, device = s.resolution, self.density.device
        index = torch.arange(g**3)
        if share >= s.warmup:
            sampled = torch.rand(g**3, generator=generator) < s.share
            index = index[sampled | (self.cells.flatten().cpu() != 0)]
        corner = torch.stack([index // (g * g), index // g % g, index % g], -1)  # [M, 3]
        points = (corner + torch.rand(corner.shape, generator=generator)) * (2 / g) - 1
        values = self.density.view(-1)
        index = index.to(device)
        values[index] = torch.maximum(values[index] * s.decay, density(points.to(device)))
        # A field that is thin everywhere keeps what is denser than its mean, so that it is never skipped as a whole.
        limit = min(s.threshold / step_size, float(values.double().mean()))
        occupied = (self.density > limit).float()[None, None]
        if s.dilate:
            occupied = nn.functional.max_pool3d(occupied, 2 * s.dilate + 1, stride=1, padding=s.dilate)
        thin = self.density < s.thin / step_size
        self.cells.copy_(occupied[0, 0].to(torch.uint8) * (1 + thin.to(torch.uint8)))

    @property
    def share(self) -> float:
        """Occupied share of the box, thin cells included."""
        return float((self.cells != 0).float().mean())
