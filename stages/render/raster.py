"""Mesh renderer: rasterise, interpolate, colour the covered pixels, shade, composite, antialias.

The order is threestudio's nvdiff_rasterizer; silhouette gradients come from the antialiasing, inner gradients from
the interpolated positions and normals. Letters: B views, V vertices, F triangles, N covered pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from stages.cameras import Views, to_clip
from stages.errors import check_shape
from stages.kernels.backend import choose_backend
from stages.kernels.dispatch import module
from stages.kernels.raster import antialias, edge_topology, interpolate, rasterise, vertex_normals
from stages.mesh.mesh import Mesh
from stages.phases import phase
from stages.render.pixels import place, take
from stages.render.shade import ALBEDO, LAMBERT, TEXTURELESS_ALBEDO, Shading, shade

NORMAL_MIN = 1e-3  # an interpolated normal shorter than this stays short, so its gradient stays below 1 / NORMAL_MIN
PLAIN = 0.8  # albedo of a mesh without colours


@dataclass(frozen=True)
class VisiblePoints:
    """The surface points under the N covered pixels.

    Args:
        pixels: [N] flat indices.
        points: [N, 3] in the world.
        normals: [N, 3] interpolated, not unit.
        cameras: [B, 3] positions.
    """

    pixels: Tensor
    points: Tensor
    normals: Tensor
    cameras: Tensor


@dataclass(frozen=True)
class MeshImages:
    """Renders of a mesh; zero where it is not, except colour, which is the backdrop's there."""

    colour: Tensor  # [B, H, W, 3] linear
    mask: Tensor  # [B, H, W, 1] coverage in [0, 1], antialiased
    rast: Tensor  # [B, H, W, 4] see stages.kernels.raster.rasterise
    visible: VisiblePoints

    @property
    def normal(self) -> Tensor:
        """[B, H, W, 3] unit, world; made when asked for, which an optimisation does not."""
        return self._image(_unit(self.visible.normals))

    @property
    def normal_picture(self) -> Tensor:
        """[B, H, W, 3] in [0, 1], the normals as colours on mid grey, antialiased; made when asked for."""
        normal = self.normal
        return torch.lerp(torch.full_like(normal, 0.5), normal * 0.5 + 0.5, self.mask).clamp(0, 1)

    @property
    def depth(self) -> Tensor:
        """[B, H, W, 1] distance from the camera along the pixel's ray; made when asked for."""
        _, height, width, _ = self.mask.shape
        camera = self.visible.cameras.index_select(0, self.visible.pixels // (height * width))
        return self._image(torch.linalg.vector_norm(self.visible.points - camera, dim=-1, keepdim=True))

    def _image(self, values: Tensor) -> Tensor:
        return place(values, self.visible.pixels, values.new_zeros(*self.mask.shape[:3], values.shape[-1]))


def _unit(normals: Tensor) -> Tensor:
    return torch.nn.functional.normalize(normals, dim=-1, eps=NORMAL_MIN)


@runtime_checkable
class Material(Protocol):
    """A surface whose colour depends on more than the place: on the triangle and where in it, as a texture's does."""

    def at(self, rast: Tensor, covered: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        """Return linear colours [N, 3] and unit normals [N, 3] of the covered pixels.

        Args:
            rast: [B, H, W, 4].
            covered: [N] flat indices of the pixels with a triangle.
            normals: [N, 3] interpolated.
        """


def render_mesh(
    vertices: Tensor,
    triangles: Tensor,
    albedo: Callable[[Tensor], Tensor] | Tensor | Material,
    views: Views,
    height: int,
    width: int,
    *,
    shading: Shading = ALBEDO,
    backdrop: Tensor | None = None,
    topology: Tensor | None = None,
    backend: str = "auto",
) -> MeshImages:
    """Render one mesh from every view.

    Args:
        vertices: [V, 3] world.
        triangles: [F, 3] int32, counter-clockwise seen from outside.
        albedo: a function from world points [N, 3] to linear colours [N, 3], called once with the covered pixels (not
            at all where there are none or the shading is textureless), one linear colour per vertex [V, 3], or a
            Material, which sees more.
        views: B views.
        height: of the pictures, pixels.
        width: of the pictures, pixels.
        backdrop: linear, [3] or [B, H, W, 3]; None is black.
        topology: edge_topology(triangles, V) where it is known already.
    Returns: MeshImages; colour and mask are antialiased, the rest is that of the pixel centre. Differentiable in
        vertices (inside through positions and normals, at silhouettes through colour and mask), in what `albedo`
        depends on, and in backdrop.
    """
    check_shape("vertices", vertices, (None, 3))
    views = views.to(vertices.device)
    batch = len(views)
    if backdrop is None:
        backdrop = vertices.new_zeros(3)
    check_shape("backdrop", backdrop, (3,) if backdrop.ndim == 1 else (batch, height, width, 3))
    if topology is None:
        topology = edge_topology(triangles, len(vertices), backend=backend)
    attributes = [vertices, vertex_normals(vertices, triangles, backend=backend)]
    if isinstance(albedo, Tensor):
        check_shape("albedo", albedo, (len(vertices), 3))
        attributes.append(albedo)
    with phase("rasterise"):
        clip = to_clip(vertices, views, width / height)
        rast = rasterise(clip, triangles, height, width, backend=backend)
        covered = (rast[..., 3] > 0).reshape(-1).nonzero()[:, 0]  # [N]
    with phase("interpolate"):
        row = take(rast, covered)[None, None]  # [1, 1, N, 4]: a picture of nothing but covered pixels
        planes = interpolate(torch.cat(attributes, -1), row, triangles, backend=backend)[0, 0]
        points, normals, *colours = planes.split(3, -1)  # [N, 3]
    if isinstance(albedo, Material):
        with phase("colour"):
            colour, normals = albedo.at(rast, covered, _unit(normals))
            colours = [colour]
    elif callable(albedo):
        with phase("colour"):
            colours = [albedo(points) if len(covered) and not shading.textureless else points]
    light = views.light if batch == 1 else views.light.index_select(0, covered // (height * width))
    shaded = shade(colours[0], normals, points, light, shading, shortest=NORMAL_MIN, backend=backend)
    backdrop = backdrop.expand(batch, height, width, 3)
    canvas = torch.cat([backdrop, backdrop.new_zeros(batch, height, width, 1)], -1)
    hard = place(torch.cat([shaded, torch.ones_like(shaded[:, :1])], -1), covered, canvas)
    with phase("antialias"):
        colour, mask = antialias(hard, rast, clip, triangles, topology, backend=backend).split([3, 1], -1)
    return MeshImages(colour, mask, rast, VisiblePoints(covered, points, normals, views.position))


@torch.no_grad()
def render_vertex_colours(
    mesh: Mesh,
    views: Views,
    size: int,
    shading: Shading = LAMBERT,
    backdrop: Tensor | None = None,
    supersample: int = 2,
    *,
    smooth: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Render pictures of a mesh with vertex colours, box-filtered from supersample^2 samples a pixel; no gradients.

    Args:
        mesh: with colours (linear; light grey where it has none).
        views: B views.
        size: pixels a side.
        backdrop: linear, [3] or [B, size, size, 3]; None is black.
        smooth: shade with vertex normals (split the vertices where a crease should show), or with face normals.
    Returns: [B, size, size, 3] linear.
    """
    vertices, triangles = torch.from_numpy(mesh.vertices).float(), torch.from_numpy(mesh.faces).int()
    colours = torch.full_like(vertices, PLAIN) if mesh.colours is None else torch.from_numpy(mesh.colours).float()
    if shading.textureless:
        colours = torch.full_like(vertices, TEXTURELESS_ALBEDO)
    if not smooth:  # every triangle gets corners of its own
        corners = triangles.reshape(-1).long()
        vertices, colours = vertices[corners], colours[corners]
        triangles = torch.arange(len(corners), dtype=torch.int32).view(-1, 3)
    normals = vertex_normals(vertices, triangles, backend=backend)
    canvas = (torch.zeros(3) if backdrop is None else backdrop).expand(len(views), size, size, 3)
    fine = size * supersample
    rast = rasterise(to_clip(vertices, views), triangles, fine, fine, backend=backend)
    if choose_backend(backend, vertices, family="raster") == "numba":
        out = torch.empty(len(views), size, size, 3)
        tensors = (rast, triangles, vertices, colours, normals, views.light)
        module("numba", "picture").picture(*tensors, shading.ambient, shading.diffuse, canvas, out)
        return out
    planes = interpolate(torch.cat([vertices, normals, colours], -1), rast, triangles, backend=backend)
    points, normals, colours = planes.split(3, -1)
    normals = torch.nn.functional.normalize(normals, dim=-1)
    plain = Shading(shading.ambient, shading.diffuse)
    colour = shade(colours, normals, points, views.light[:, None, None], plain)
    mask = (rast[..., 3:] > 0).to(colour.dtype)
    samples = torch.cat([colour * mask, mask], -1).view(len(views), size, supersample, size, supersample, 4)
    pooled = samples.mean((2, 4))
    return pooled[..., :3] + (1 - pooled[..., 3:]) * canvas
