"""A surface around a cloud: the signed-distance network asked on a grid, and the density that the next stage cuts.

Coarsely everywhere, then finely where the coarse answer is near the surface. Letters: G grid points a side.
Source: Point-E (arXiv 2212.08751) sec. 4.5, there on one grid by marching cubes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.points.cloud import REACH
from stages.points.transformer import SdfNetwork

BOX = 0.9  # half the side of the grid's cube, world units
SEEN = 1024  # points of the cloud that the network looks at
QUERIES = 4096  # asked at once
DENSITY = 80.0  # of a solid, per world length
SOFT = 0.01  # signed distance over which the density falls
BAND = 1.5  # coarse cells beside the surface that are asked finely


@torch.no_grad()
def distance_grid(network: SdfNetwork, points: Tensor, cells: int) -> Tensor:
    """Return signed distances [G, G, G], world units, negative inside, at regular points of the cube: axes x, y, z.

    Args:
        points: [K, 3] world units; every K / SEEN-th is looked at.
        cells: G, a multiple of 2.
    """
    code = network.encode(points[:: max(1, len(points) // SEEN)][None] / REACH)

    def ask(places: Tensor) -> Tensor:
        parts = [network(code, part[None] / REACH)[0] for part in places.split(QUERIES)]
        return REACH * torch.cat(parts)

    coarse_side = cells // 2
    coarse = ask(_places(coarse_side, points.device)).view(1, 1, *[coarse_side] * 3)
    grid = F.interpolate(coarse, (cells, cells, cells), mode="trilinear", align_corners=True).flatten()
    near = (grid.abs() < BAND * 2 * BOX / (coarse_side - 1)).nonzero()[:, 0]
    if len(near):
        grid[near] = ask(_places(cells, points.device)[near])
    if bool((grid > 0).all()) or bool((grid < 0).all()):  # as in Point-E: some level is better than none
        grid = grid - grid.mean()
    return grid.view(cells, cells, cells)


def _places(cells: int, device: torch.device) -> Tensor:
    axis = torch.linspace(-BOX, BOX, cells, device=device)
    return torch.cartesian_prod(axis, axis, axis)


def density_of(grid: Tensor, points: Tensor) -> Tensor:
    """Return the density [N] at points [N, 3] of a grid [G, G, G] of signed distances; none outside of its cube."""
    places = (points / BOX).flip(-1).view(1, 1, 1, -1, 3)
    sdf = F.grid_sample(grid[None, None], places, padding_mode="border", align_corners=True).flatten()
    density = DENSITY * torch.sigmoid(-sdf / SOFT)
    return torch.where(points.abs().amax(-1) < BOX, density, torch.zeros_like(density))
