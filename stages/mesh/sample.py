"""Points on a mesh's surface, and the colours it has there: from its texture, its vertices, or plain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stages.kernels.srgb import srgb_to_linear
from stages.mesh.measure import face_areas
from stages.mesh.mesh import Mesh


def surface_samples(mesh: Mesh, count: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return random places spread evenly over the area: face [N] int64 and barycentric weights [N, 3] float64.

    One draw falls into each N-th of the area, faces taken in their order.
    """
    share = np.cumsum(face_areas(mesh.vertices, mesh.faces))
    u, v, w = torch.rand(3, count, generator=generator, dtype=torch.float64).numpy()
    face = np.searchsorted(share / share[-1], (np.arange(count) + u) / count)
    face = np.minimum(face, len(mesh.faces) - 1)
    v = np.sqrt(v)
    return face, np.stack([1 - v, v * (1 - w), v * w], -1)


def painted_samples(mesh: Mesh, generator: torch.Generator) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return a function from a count N to random surface points [N, 3] and the mesh's linear colours [N, 3] there."""

    def draw(count: int) -> tuple[Tensor, Tensor]:
        face, weights = surface_samples(mesh, count, generator)
        return torch.from_numpy(points_at(mesh, face, weights)).float(), colours_at(mesh, face, weights)

    return draw


def asked_samples(
    mesh: Mesh, albedo: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return a function as of painted_samples, with the colours that `albedo` has there: points [N, 3] to [N, 3]."""

    def draw(count: int) -> tuple[Tensor, Tensor]:
        points = torch.from_numpy(points_at(mesh, *surface_samples(mesh, count, generator))).float()
        return points, albedo(points)

    return draw


def points_at(mesh: Mesh, face: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return positions [N, 3] float64 of barycentric places."""
    return np.einsum("nc,nck->nk", weights, mesh.vertices[mesh.faces[face]].astype(np.float64))


def colours_at(mesh: Mesh, face: np.ndarray, weights: np.ndarray) -> Tensor:
    """Return the mesh's own linear colours [N, 3] float32 at barycentric places; mid grey where it has none."""
    if mesh.texture is not None and mesh.uv is not None:
        uv = np.einsum("nc,nck->nk", weights, mesh.uv[mesh.uv_faces[face]].astype(np.float64))
        return _looked_up(mesh.texture, uv)
    if mesh.colours is None:
        return torch.full((len(face), 3), 0.5)
    return torch.from_numpy(np.einsum("nc,nck->nk", weights, mesh.colours[mesh.faces[face]])).float()


def _looked_up(texture: np.ndarray, uv: np.ndarray) -> Tensor:
    """Bilinear look-up in linear colour, clamped at the border; row 0 of the texture is v = 1.

    Only the texels asked for are made linear: a fit draws from a large texture hundreds of times.
    """
    height, width = texture.shape[:2]
    x = np.clip(uv[:, 0] * width - 0.5, 0, width - 1)
    y = np.clip((1 - uv[:, 1]) * height - 0.5, 0, height - 1)
    left, above = np.floor(x).astype(int), np.floor(y).astype(int)
    columns, rows = (
        np.stack([left, np.minimum(left + 1, width - 1)]),
        np.stack([above, np.minimum(above + 1, height - 1)]),
    )
    texels = srgb_to_linear(torch.from_numpy(texture[rows[:, None], columns[None], :3].astype(np.float32) / 255))
    across, down = (torch.from_numpy(t).float()[:, None] for t in (x - left, y - above))
    upper, lower = (torch.lerp(texels[k, 0], texels[k, 1], across) for k in (0, 1))
    return torch.lerp(upper, lower, down)
