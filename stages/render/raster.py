"""Mesh renderer: rasterise, interpolate, colour the covered pixels, shade, composite, antialias.

The order is threestudio's nvdiff_rasterizer; silhouette gradients come from the antialiasing, inner gradients from
the interpolated positions and normals. Letters: B views, V vertices, F triangles, N covered pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.cameras import Views, to_clip
from stages.errors import check_shape
from stages.kernels.raster import interpolate, rasterise
from stages.mesh.mesh import Mesh
from stages.render.shade import ALBEDO, LAMBERT, Shading, shade


@dataclass(frozen=True)
class MeshImages:
    """What a mesh looks like; zeros where it is not, except colour, which shows the background there."""

    colour: Tensor  # [B, H, W, 3] linear
    mask: Tensor  # [B, H, W, 1] coverage in [0, 1]
    normal: Tensor  # [B, H, W, 3] unit, world
    depth: Tensor  # [B, H, W, 1] distance from the camera along the pixel's ray
    rast: Tensor  # [B, H, W, 4] see stages.kernels.raster.rasterise


def vertex_normals(vertices: Tensor, triangles: Tensor) -> Tensor:
    """Area-weighted unit vertex normals [V, 3]; +y, without gradient, at a vertex that no face gives one."""
    corners = triangles.long().T.reshape(-1)  # [3 F]
    a, b, c = vertices.index_select(0, corners).reshape(3, -1, 3)
    face = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices).index_add(0, corners, face.repeat(3, 1))
    square = total.square().sum(-1, keepdim=True)
    found = square > 1e-24
    up = torch.tensor([0.0, 1.0, 0.0], dtype=vertices.dtype, device=vertices.device)
    return torch.where(found, total * torch.where(found, square, 1).rsqrt(), up)


def render_mesh(
    vertices: Tensor,
    triangles: Tensor,
    albedo: Callable[[Tensor], Tensor] | Tensor,
    views: Views,
    height: int,
    width: int,
    *,
    shading: Shading = ALBEDO,
    background: Tensor | None = None,
    backend: str = "auto",
) -> MeshImages:
    """Render one mesh from every view.

    Args:
        vertices: [V, 3] world. triangles: [F, 3] int32, counter-clockwise seen from outside.
        albedo: a function from world points [N, 3] to linear colours [N, 3], called once with the covered pixels
            (not at all when there are none), or one linear colour per vertex [V, 3].
        views: B views. height, width: pixels.
        background: linear, [3] or [B, H, W, 3]; None is black.
    Returns: MeshImages.
    """
    check_shape("vertices", vertices, (None, 3))
    views = views.to(vertices.device)
    batch = len(views)
    if background is None:
        background = vertices.new_zeros(3)
    check_shape("background", background, (3,) if background.ndim == 1 else (batch, height, width, 3))
    attributes = [vertices, vertex_normals(vertices, triangles)]
    if isinstance(albedo, Tensor):
        check_shape("albedo", albedo, (len(vertices), 3))
        attributes.append(albedo)
    clip = to_clip(vertices, views, width / height)
    rast = rasterise(clip, triangles, height, width, backend=backend)
    covered = (rast[..., 3] > 0).reshape(-1).nonzero()[:, 0]  # [N]
    planes = interpolate(torch.cat(attributes, -1), rast, triangles, backend=backend)
    points, normals, *colours = planes.flatten(0, 2).index_select(0, covered).split(3, -1)  # [N, 3]
    normals = torch.nn.functional.normalize(normals, dim=-1)
    view = covered // (height * width)
    if len(covered) and not isinstance(albedo, Tensor):
        colours = [albedo(points)]
    shaded = shade(colours[0], normals, points, views.light[view], shading) if colours else points

    def image(values: Tensor, under: Tensor) -> Tensor:
        return under.reshape(-1, values.shape[-1]).index_copy(0, covered, values).view(batch, height, width, -1)

    colour = image(shaded, background.expand(batch, height, width, 3))
    empty = vertices.new_zeros(batch, height, width, 3)
    distance = torch.linalg.vector_norm(points - views.position[view], dim=-1, keepdim=True)
    mask = (rast[..., 3:] > 0).to(vertices.dtype)
    return MeshImages(colour, mask, image(normals, empty), image(distance, empty[..., :1]), rast)


@torch.no_grad()
def render_vertex_colours(
    mesh: Mesh,
    views: Views,
    size: int,
    shading: Shading = LAMBERT,
    background: Tensor | None = None,
    supersample: int = 2,
    *,
    smooth: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Pictures of a mesh with vertex colours, box-filtered from supersample^2 samples a pixel; no gradients.

    Args:
        mesh: with colours (linear; light grey where it has none). views: B views. size: pixels a side.
        background: linear, [3] or [B, size, size, 3]; None is black.
        smooth: shade with vertex normals (split the vertices where a crease should show), or with face normals.
    Returns: [B, size, size, 3] linear.
    """
    vertices, triangles = torch.from_numpy(mesh.vertices).float(), torch.from_numpy(mesh.faces).int()
    fine = size * supersample
    rast = rasterise(to_clip(vertices, views), triangles, fine, fine, backend=backend)
    attributes = [torch.full_like(vertices, 0.8) if mesh.colours is None else torch.from_numpy(mesh.colours).float()]
    if shading.diffuse:
        attributes.append(vertices)
        if smooth:
            attributes.append(vertex_normals(vertices, triangles))
    planes = interpolate(torch.cat(attributes, -1), rast, triangles, backend=backend)
    mask = (rast[..., 3:] > 0).float()
    colour, *rest = planes.split(3, -1)
    if shading.diffuse and not smooth:
        faces = torch.from_numpy(mesh.face_normals()).float()
        rest.append(torch.cat([faces.new_zeros(1, 3), faces]).index_select(0, rast[..., 3].reshape(-1).long()))
        rest[1] = rest[1].view_as(colour)
    if shading.diffuse:
        normals = torch.nn.functional.normalize(rest[1], dim=-1)
        colour = shade(colour, normals, rest[0], views.light[:, None, None], shading)
    else:
        colour = shade(colour, colour, colour, colour, shading)
    pooled = torch.cat([colour * mask, mask], -1).view(len(views), size, supersample, size, supersample, 4).mean((2, 4))
    under = torch.zeros(3) if background is None else background
    return pooled[..., :3] + (1 - pooled[..., 3:]) * under
