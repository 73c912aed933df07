"""The reference prior: the exact denoiser of a finite set of images, here renders of a given mesh.

Data distribution p(x) = (1/K) sum_i N(x; y_i, s^2 I) over images y_i in [-1, 1] (s = 0: delta functions). Then
    posterior of i given z_t:  w_i ~ exp(-||z_t - alpha y_i||^2 / (2 (alpha^2 s^2 + sigma^2)))
    eps_hat(z_t) = sigma / (alpha^2 s^2 + sigma^2) * sum_i w_i (z_t - alpha y_i)
which is E[eps | z_t] exactly (Karras et al. 2022 app. B.3, with the variance-preserving scaling). With K = 1 and
s = 0 the SDS residual eps_hat - eps is alpha / sigma (x - y), free of noise: the optimum is y and known.

The set belongs to the view: one render at that very view (`pose: exact`), or renders from all over its view class at
its distance and field of view (`pose: class`), with its light, shading and backdrop.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stages.cameras import Views, direction, look_at, to_clip
from stages.guidance.prior import ViewContext, per_sample, resized, scaled_linear_alphas_cumprod
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.mesh.files.read import GREY, read_mesh
from stages.mesh.mesh import Mesh
from stages.prompts import PromptSettings, view_class
from stages.render.shade import ALBEDO, Shading, shade

FIT_RADIUS = 0.8  # of the bounding sphere that a mesh too large for the scene is scaled to
SCENE_RADIUS = 0.87


class ReferenceSettings(BaseModel):
    """The image set of the reference prior."""

    model_config = ConfigDict(extra="forbid")

    mesh: str = Field("", description="mesh file to rebuild; moved and scaled only if it leaves the scene's sphere")
    pose: Literal["exact", "class"] = Field("exact", description="one image at the asked view, or its whole class")
    resolution: int | None = Field(
        None, ge=8, le=2048, description="side of the images in pixels; null: what the stage renders at, 64 without one"
    )
    std: float = Field(0.0, ge=0, le=1, description="blur of the image set: standard deviation about each image")
    supersample: int = Field(2, ge=1, le=8, description="samples a pixel side in the target renders")
    class_azimuths: int = Field(8, ge=1, le=64, description="pose class: views around, within the class")
    class_elevations: int = Field(3, ge=1, le=16, description="pose class: views up and down, within the class")
    class_elevation_deg: tuple[float, float] = Field((-10.0, 75.0), description="pose class: elevations of the set")
    background: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="linear, where the stage names none")


def mixture_noise(z_t: Tensor, images: Tensor, alpha_bar: Tensor, std: float = 0.0) -> Tensor:
    """Return E[eps | z_t] when x is one of K equally likely images blurred by `std`: the module's formula.

    Args:
        z_t: [B, C, h, w].
        images: [B, K, C, h, w].
        alpha_bar: [B], below 1.
        std: standard deviation about each image, at least 0.
    Returns: [B, C, h, w].
    """
    alpha, sigma = per_sample(alpha_bar.sqrt(), z_t), per_sample((1 - alpha_bar).sqrt(), z_t)
    variance = alpha**2 * std**2 + sigma**2  # [B, 1, 1, 1]
    offsets = z_t[:, None] - alpha[:, None] * images  # [B, K, C, h, w]
    if images.shape[1] > 1:
        logits = -offsets.double().square().sum((2, 3, 4)) / (2 * variance.double().reshape(-1, 1))  # [B, K]
        weights = logits.softmax(1).to(z_t.dtype)
        offset = (weights[:, :, None, None, None] * offsets).sum(1)
    else:
        offset = offsets[:, 0]
    return sigma / variance * offset


class ReferencePrior:
    """The exact denoiser of renders of a mesh, in pixel space; prompts are ignored.

    Args:
        mesh: what to rebuild, in world coordinates (see :func:`fit_scene`).
        settings: image set and resolution.
        prompts: the thresholds of the view classes.

    Example:
        >>> prior = ReferencePrior(read_mesh("mug.glb"), ReferenceSettings(resolution=64))
        >>> guidance = Guidance(prior, GuidanceSettings(scale=1), ViewPrompts("anything"), torch.Generator())
    """

    name = "reference"
    data_range = (-1.0, 1.0)
    prediction = "epsilon"
    reads_prompts = False
    reads_t_anywhere = False

    def __init__(self, mesh: Mesh, settings: ReferenceSettings, prompts: PromptSettings | None = None) -> None:
        self.mesh, self.settings, self.prompts = mesh, settings, prompts or PromptSettings()
        self.resolution = settings.resolution or 64
        self.alphas_cumprod = scaled_linear_alphas_cumprod()
        self._corners = _corners(mesh)

    def embed(self, prompts: list[str]) -> Tensor:
        """Return zeros [P, 1]: prompts are ignored."""
        return torch.zeros(len(prompts), 1)

    def encode(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return [B, 3, h, w] in [-1, 1] of sRGB images [B, H, W, 3] in [0, 1], resized when of another size."""
        return resized(images.permute(0, 3, 1, 2) * 2 - 1, self.resolution)

    def decode(self, x: Tensor) -> Tensor:
        """Return sRGB images [B, h, w, 3] clamped to [0, 1] of x [B, 3, h, w]."""
        return (x.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def predict_noise(self, z_t: Tensor, t: Tensor, embedding: Tensor, context: ViewContext) -> Tensor:
        """Return the exact eps for the image set of each view."""
        images = self.image_set(context).to(z_t)
        return mixture_noise(z_t, images, self.alphas_cumprod[t.cpu()], self.settings.std)

    @torch.no_grad()
    def image_set(self, context: ViewContext) -> Tensor:
        """Return the K images [B, K, 3, h, w] in [-1, 1] of each view of the context."""
        s, side, shading = self.settings, self.resolution, context.shading or ALBEDO
        backdrop = torch.tensor(s.background) if context.backdrop is None else context.backdrop.float().cpu()
        backdrop = backdrop.expand(len(context), *backdrop.shape[-3:]) if backdrop.dim() == 4 else backdrop
        if backdrop.dim() == 4 and backdrop.shape[1:3] != (side, side):
            backdrop = resized(backdrop.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
        views = context.views.to("cpu")
        if s.pose == "exact":
            linear = self.render(views, shading, backdrop)[:, None]  # [B, 1, h, w, 3]
        else:
            sets = []
            for k in range(len(views)):
                group = class_views(views[k], s, self.prompts)
                under = backdrop[k : k + 1].expand(len(group), -1, -1, -1) if backdrop.dim() == 4 else backdrop
                sets.append(self.render(group, shading, under))
            linear = torch.stack(sets)  # [B, K, h, w, 3], every class having the same K
        return linear_to_srgb(linear).permute(0, 1, 4, 2, 3) * 2 - 1

    @torch.no_grad()
    def render(self, views: Views, shading: Shading = ALBEDO, backdrop: Tensor | None = None) -> Tensor:
        """Return linear renders [B, h, w, 3] of the mesh, box-filtered from supersample^2 samples a pixel.

        Args:
            views: B views.
            shading: one for all views.
            backdrop: linear colour, broadcastable to [B, h, w, 3]; None: the settings' `background`.
        """
        from stages.kernels.raster import interpolate, rasterise

        vertices, triangles, attributes, texture = self._corners
        side, n = self.resolution, self.settings.supersample
        rast = rasterise(to_clip(vertices, views), triangles, side * n, side * n)
        planes = interpolate(attributes, rast, triangles)  # [B, nH, nW, 6 + (2 or 3)]
        mask = (rast[..., 3:] > 0).float()
        positions, normals, colour = planes[..., :3], F.normalize(planes[..., 3:6], dim=-1), planes[..., 6:]
        if texture is not None:
            grid = torch.cat([colour[..., :1] * 2 - 1, 1 - 2 * colour[..., 1:]], -1)
            source = texture.expand(len(views), -1, -1, -1)
            colour = F.grid_sample(source, grid, padding_mode="border", align_corners=False).permute(0, 2, 3, 1)
        colour = shade(colour, normals, positions, views.light[:, None, None], shading)
        pooled = F.avg_pool2d(torch.cat([colour * mask, mask], -1).permute(0, 3, 1, 2), n).permute(0, 2, 3, 1)
        colour_behind = torch.tensor(self.settings.background) if backdrop is None else backdrop
        return pooled[..., :3] + (1 - pooled[..., 3:]) * colour_behind


def load_reference(settings: ReferenceSettings, prompts: PromptSettings | None = None) -> ReferencePrior:
    """Load the reference prior of the mesh file that the settings name.

    Args:
        settings: `mesh` is the file.
        prompts: the thresholds of the view classes.
    Raises: UserError if the file cannot be read.

    Example:
        >>> prior = load_reference(ReferenceSettings(mesh="mug.glb"))
    """
    return ReferencePrior(fit_scene(read_mesh(settings.mesh)), settings, prompts)


def fit_scene(mesh: Mesh) -> Mesh:
    """Return the mesh itself if it lies within the scene's sphere, else centred on its box and scaled to radius 0.8."""
    vertices = mesh.vertices
    if np.abs(vertices).max() > 1e15:  # whose squares float32 cannot hold
        vertices = vertices.astype(np.float64)
    if np.linalg.norm(vertices, axis=1).max() <= SCENE_RADIUS:
        return mesh
    centre = (vertices.min(0) + vertices.max(0)) / 2
    scale = FIT_RADIUS / max(float(np.linalg.norm(vertices - centre, axis=1).max()), 1e-12)
    vertices = ((vertices - centre) * scale).astype(np.float32)
    return Mesh(vertices, mesh.faces, mesh.colours, mesh.uv, mesh.uv_faces, mesh.texture)


def class_views(view: Views, settings: ReferenceSettings, prompts: PromptSettings) -> Views:
    """Return views spread over the class of one view, at its distance and field of view; the light moves along."""
    name = view_class(float(view.azimuth_deg), float(view.elevation_deg), prompts)
    front, back = prompts.front_deg, prompts.back_deg
    n, low, high = settings.class_azimuths, *settings.class_elevation_deg
    share = (torch.arange(n) + 0.5) / n
    if name == "overhead":
        azimuth, low = share * 360, prompts.overhead_deg
        high = max(high, low + 1)
    else:
        high = min(high, prompts.overhead_deg)
        arcs = {"front": (-front, front), "left side": (front, back), "back": (back, 360 - back)}
        arcs["right side"] = (-back, -front)
        if name == "side":  # both sides; one azimuth of an odd number more on the left
            left, right = (torch.arange(m) + 0.5 for m in ((n + 1) // 2, n // 2))
            span = back - front
            azimuth = torch.cat([front + span * left / max(len(left), 1), -back + span * right / max(len(right), 1)])
        else:
            first, last = arcs[name]
            azimuth = first + (last - first) * share
    m = settings.class_elevations
    elevation = low + (high - low) * (torch.arange(m) + 0.5) / m
    azimuth, elevation = azimuth.repeat(m), elevation.repeat_interleave(n)
    distance = torch.linalg.vector_norm(view.position[0])
    position = distance * direction(azimuth, elevation)
    c2w = look_at(position, torch.zeros_like(position), torch.tensor([0.0, 1.0, 0.0]).expand_as(position))
    local = torch.linalg.inv(view.c2w[0]) @ F.pad(view.light[0], (0, 1), value=1.0)
    light = (c2w @ local)[:, :3]
    return Views(c2w, view.fov_deg.expand(n * m), azimuth % 360, elevation, light)


def crease_normals(vertices: np.ndarray, faces: np.ndarray, crease_deg: float = 40.0) -> np.ndarray:
    """Return unit normals [F, 3, 3] per face corner: area-weighted over the faces at its position within the angle.

    Vertices at equal positions count as one, so texture seams do not show; edges sharper than `crease_deg` do.
    """
    _, weld = np.unique(vertices, axis=0, return_inverse=True)
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    area = np.cross(b - a, c - a)
    unit = area / np.maximum(np.linalg.norm(area, axis=1, keepdims=True), 1e-20)
    corner_vertex = weld.reshape(-1)[faces].reshape(-1)  # [3F]
    order = np.argsort(corner_vertex, kind="stable")
    counts = np.bincount(corner_vertex)
    starts = np.cumsum(counts) - counts
    # every corner meets every corner at its vertex: pairs (corner, other)
    degree = counts[corner_vertex]
    corner = np.repeat(np.arange(len(corner_vertex)), degree)
    rank = np.arange(len(corner)) - np.repeat(np.cumsum(degree) - degree, degree)
    other = order[starts[corner_vertex[corner]] + rank]
    close = np.einsum("ij,ij->i", unit[corner // 3], unit[other // 3]) >= np.cos(np.radians(crease_deg))
    total = np.zeros((len(corner_vertex), 3))
    for k in range(3):
        total[:, k] = np.bincount(corner[close], area[other[close] // 3, k], minlength=len(corner_vertex))
    length = np.linalg.norm(total, axis=1, keepdims=True)
    normals = np.where(length > 1e-20, total / np.maximum(length, 1e-20), np.repeat(unit, 3, 0))
    return normals.reshape(-1, 3, 3).astype(np.float32)


def _corners(mesh: Mesh) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One vertex a corner: positions [3F, 3], triangles [F, 3], attributes [3F, 8 or 9] (position, normal, uv or
    colour) and the linear texture [1, 3, H, W] if there is one."""
    positions = torch.from_numpy(np.ascontiguousarray(mesh.vertices[mesh.faces], np.float32)).reshape(-1, 3)
    triangles = torch.arange(len(positions), dtype=torch.int32).reshape(-1, 3)
    normals = torch.from_numpy(crease_normals(mesh.vertices, mesh.faces)).reshape(-1, 3)
    texture = None
    if mesh.texture is not None and mesh.uv is not None:
        last = torch.from_numpy(np.ascontiguousarray(mesh.uv[mesh.uv_faces], np.float32)).reshape(-1, 2)
        image = torch.from_numpy(mesh.texture[..., :3].copy()).float() / 255
        texture = srgb_to_linear(image).permute(2, 0, 1)[None]
    elif mesh.colours is not None:
        last = torch.from_numpy(np.ascontiguousarray(mesh.colours[mesh.faces], np.float32)).reshape(-1, 3)
    else:
        last = torch.full_like(positions, GREY)
    return positions, triangles, torch.cat([positions, normals, last], -1), texture
