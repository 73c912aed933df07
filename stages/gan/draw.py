"""Pictures of a batch of shapes, each from its own view: one picture of tiles below each other, rasterised at once.

Letters: B shapes, V vertices, F faces, S side of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.cameras import Views, projection
from stages.gan.generator import Generator, Planes
from stages.gan.tets import Surfaces
from stages.kernels.raster import antialias, edge_topology, interpolate, rasterise, vertex_normals
from stages.kernels.srgb import srgb_to_linear
from stages.render.pixels import place, take
from stages.render.raster import NORMAL_MIN
from stages.render.shade import Shading, shade


@dataclass(frozen=True)
class Pictures:
    """Linear colours [B, S, S, 3], black where nothing is, and coverage [B, S, S, 1]; both antialiased."""

    colour: Tensor
    mask: Tensor

    def over(self, backdrop: Tensor) -> Tensor:
        """Return linear pictures [B, S, S, 3] on a linear backdrop, [3] or [B, S, S, 3]."""
        return self.colour + (1 - self.mask) * backdrop


def tiled_clip(surfaces: Surfaces, views: Views) -> Tensor:
    """Return clip coordinates [V, 4] of each vertex in its own shape's view, in a picture of B tiles."""
    batch = len(views)
    matrices = projection(views.fov_deg) @ torch.linalg.inv_ex(views.c2w)[0]  # [B, 4, 4]
    tile = torch.arange(batch, device=matrices.device, dtype=matrices.dtype)
    shift = (batch - 1 - 2 * tile)[:, None]
    rows = torch.cat(
        [matrices[:, :1], (matrices[:, 1:2] + shift[..., None] * matrices[:, 3:]) / batch, matrices[:, 2:]], 1
    )
    homogeneous = torch.nn.functional.pad(surfaces.vertices, (0, 1), value=1.0)
    return torch.einsum("vij,vj->vi", rows.index_select(0, surfaces.owner), homogeneous)


def draw(
    generator: Generator, planes: Planes, surfaces: Surfaces, views: Views, size: int, shading: Shading
) -> Pictures:
    """Return pictures of shapes, differentiable in surfaces and planes.

    Args:
        surfaces: of B shapes.
        views: B views, one each; they see nothing outside of their tile.
        size: S.
        shading: of all.
    """
    batch, faces = len(views), surfaces.faces
    clip = tiled_clip(surfaces, views)[None].contiguous()
    rast = rasterise(clip, faces, batch * size, size)
    covered = (rast[..., 3] > 0).reshape(-1).nonzero()[:, 0]
    owner = torch.div(covered, size * size, rounding_mode="floor")
    attributes = torch.cat([surfaces.vertices, vertex_normals(surfaces.vertices, faces)], -1)
    points, normals = interpolate(attributes, take(rast, covered)[None, None], faces)[0, 0].split(3, -1)
    albedo = srgb_to_linear(generator.colours(planes, points, owner))
    light = views.light.to(points).index_select(0, owner)
    shaded = shade(albedo, normals, points, light, shading, shortest=NORMAL_MIN)
    values = torch.cat([shaded, torch.ones_like(shaded[:, :1])], -1)
    canvas = values.new_zeros(1, batch * size, size, 4)
    picture = place(values, covered, canvas)
    picture = antialias(picture, rast, clip, faces, edge_topology(faces, len(surfaces.vertices)))
    picture = picture.view(batch, size, size, 4)
    return Pictures(*picture.split([3, 1], -1))
