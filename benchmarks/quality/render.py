"""Evaluation renders: any mesh, with its texture or its vertex colours, from fixed views.

Every system is seen the same way: by the toolkit's rasteriser, on one neutral grey, under one light, with two by two
samples a pixel. A texture is looked up in torch (bilinear, in linear colour), not by the kernels that optimised it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.cameras import Views, orbit_views, to_clip
from stages.kernels.raster import interpolate, rasterise
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.mesh import Mesh
from stages.render.shade import ALBEDO, Shading, shade

COLOUR = Shading(ambient=0.5, diffuse=0.5)  # the middle of what the priors and the pocket CLIP have seen
CLAY = Shading(ambient=0.4, diffuse=0.6, textureless=True)
GREY = 0.675  # sRGB, the middle of the backgrounds the pocket models know
SUPERSAMPLE = 2


@dataclass(frozen=True)
class Subject:
    """A mesh ready to be rendered: colours [V, 3] linear, or uv [V, 2] with a linear texture [H, W, 3]."""

    vertices: Tensor  # [V, 3] float32
    triangles: Tensor  # [F, 3] int32
    normals: Tensor  # [V, 3] unit
    colours: Tensor | None
    uv: Tensor | None
    texture: Tensor | None

    @staticmethod
    def of(mesh: Mesh) -> Subject:
        """Split along UV seams; normals are those of the welded surface, so that seams do not show in the shading."""
        if mesh.uv is None or mesh.texture is None:
            colours = np.full_like(mesh.vertices, 0.6) if mesh.colours is None else mesh.colours
            parts = (mesh.vertices, mesh.faces, mesh.vertex_normals(), colours)
            return Subject(*(torch.from_numpy(np.ascontiguousarray(p)) for p in parts), None, None)
        _, place = np.unique(mesh.vertices, axis=0, return_inverse=True)
        place = place.reshape(-1)
        welded = Mesh(_first_of(mesh.vertices, place), place[mesh.faces].astype(np.int32))
        pairs = np.stack([mesh.faces.reshape(-1), mesh.uv_faces.reshape(-1)], -1)
        corners, faces = np.unique(pairs, axis=0, return_inverse=True)
        texture = srgb_to_linear(torch.from_numpy(mesh.texture).float() / 255)
        return Subject(
            torch.from_numpy(mesh.vertices[corners[:, 0]]),
            torch.from_numpy(faces.reshape(-1, 3).astype(np.int32)),
            torch.from_numpy(welded.vertex_normals()[place[corners[:, 0]]]),
            None,
            torch.from_numpy(mesh.uv[corners[:, 1]]),
            texture,
        )

    def colour_of(self, attributes: Tensor) -> Tensor:
        """Return linear colours [N, 3] from interpolated colours or uv."""
        if self.texture is None:
            return attributes
        grid = torch.stack([2 * attributes[:, 0] - 1, 1 - 2 * attributes[:, 1]], -1)[None, None]  # row 0 is v = 1
        image = self.texture.permute(2, 0, 1)[None]
        return F.grid_sample(image, grid, "bilinear", "border", align_corners=False)[0, :, 0].T


def _first_of(values: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The value of each label's first row."""
    _, first = np.unique(label, return_index=True)
    return values[first]


@torch.no_grad()
def shoot(
    subject: Subject, views: Views, size: int, shading: Shading = COLOUR, background: float = GREY
) -> tuple[Tensor, Tensor]:
    """Pictures of a subject.

    Args:
        views: B views.
        size: pixels a side.
        background: sRGB grey.
    Returns: linear images [B, size, size, 3] and coverage [B, size, size, 1] in [0, 1].
    """
    fine, batch = size * SUPERSAMPLE, len(views)
    rast = rasterise(to_clip(subject.vertices, views), subject.triangles, fine, fine)
    looks = subject.colours if subject.texture is None else subject.uv
    planes = interpolate(torch.cat([subject.vertices, subject.normals, looks], -1), rast, subject.triangles)
    covered = (rast[..., 3] > 0).reshape(-1).nonzero()[:, 0]
    points, normals, looks = planes.flatten(0, 2)[covered].split([3, 3, planes.shape[-1] - 6], -1)
    light = views.light[covered // (fine * fine)]
    shaded = shade(subject.colour_of(looks), F.normalize(normals, dim=-1), points, light, shading)
    image = torch.zeros(batch * fine * fine, 4).index_copy(0, covered, F.pad(shaded, (0, 1), value=1.0))
    image = image.view(batch, size, SUPERSAMPLE, size, SUPERSAMPLE, 4).mean((2, 4))
    under = float(srgb_to_linear(torch.tensor(background)))
    return image[..., :3] + (1 - image[..., 3:]) * under, image[..., 3:]


def ring(count: int, elevation_deg: float = 30.0, start_deg: float = 0.0) -> Views:
    """`count` views evenly around the object at one elevation (DreamFusion app. A.3 scores at 30 degrees)."""
    return orbit_views([start_deg + 360 * k / count for k in range(count)], elevation_deg)


def albedo_of(subject: Subject, views: Views, size: int) -> tuple[Tensor, Tensor]:
    """Return unshaded pictures and coverage."""
    return shoot(subject, views, size, ALBEDO)
