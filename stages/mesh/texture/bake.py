"""Bake a colour field into a texture: every texel a bilinear lookup can touch gets the field's own colour.

Texels whose centres lie in a face take the colour at the surface point under them; texels within 1.5 texels of a chart
border take it at the closest point of the border, so bilinear filtering never sees background; all others are filled
by push-pull (Gortler et al. 1996), so mip maps do not either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stages.errors import UserError
from stages.kernels.srgb import linear_to_srgb
from stages.mesh.measure import edges_of
from stages.mesh.mesh import Mesh
from stages.mesh.texture.texels import barycentrics, near_borders, scan
from stages.mesh.texture.uv import texel_corners

log = logging.getLogger(__name__)

Albedo = Callable[[Tensor], Tensor]  # [N, 3] world -> [N, 3] linear RGB in [0, 1]

REACH = 1.5  # texels; a bilinear lookup reaches texel centres up to sqrt(2) away
POINTS_PER_CALL = 1 << 16
# More non-finite colours than this share of the texels is a broken field, not a blemish.
BLEMISHES = 0.01


def texel_points(uv: np.ndarray, uv_faces: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the surface point that each texel shows.

    Returns: texel [N] int64 as row * size + column (row 0 at the top), face [N] int64, weights [N, 3] float32
        barycentric; each texel once, in texel order.
    """
    corners = texel_corners(uv, uv_faces, size)
    owner = np.full(size * size, -1, dtype=np.int64)
    weights = np.zeros((size * size, 3), dtype=np.float32)
    for face, row, column in scan(corners):
        inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
        face, row, column = face[inside], row[inside], column[inside]
        texel = (size - 1 - row) * size + column
        owner[texel] = face
        weights[texel] = barycentrics(corners[face], np.stack([column, row], -1) + 0.5)

    edges = edges_of(uv_faces)
    borders = np.flatnonzero(edges.count[edges.of_half_edge] != 2)
    closest = np.full(size * size, np.inf, dtype=np.float32)
    covered = owner >= 0
    for edge, row, column, t, distance in near_borders(corners, borders, REACH):
        texel = (size - 1 - row) * size + column
        inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
        inside[inside] = ~covered[texel[inside]]
        edge, texel, t, distance = edge[inside], texel[inside], t[inside], distance[inside].astype(np.float32)
        order = np.lexsort((edge, distance, texel))
        order = order[np.unique(texel[order], return_index=True)[1]]  # the closest border of each texel
        order = order[distance[order] < closest[texel[order]]]
        edge, texel, t = edge[order], texel[order], t[order]
        closest[texel] = distance[order]
        owner[texel] = borders[edge] // 3
        k = borders[edge] % 3
        weights[texel] = 0
        weights[texel, k] = 1 - t
        weights[texel, (k + 1) % 3] = t
    texel = np.flatnonzero(owner >= 0)
    return texel, owner[texel], weights[texel]


def push_pull(image: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Fill the empty texels of `image` [H, W, C] with means of ever larger neighbourhoods; `filled` [H, W] stay."""
    height, width = filled.shape
    if not filled.any() or filled.all():
        return image
    padding = [(0, height % 2), (0, width % 2)]
    weight = np.pad(filled.astype(np.float32), padding)
    total = np.pad(image * filled[..., None], [*padding, (0, 0)])

    def halve(a: np.ndarray) -> np.ndarray:
        return a[0::2, 0::2] + a[1::2, 0::2] + a[0::2, 1::2] + a[1::2, 1::2]

    coarse_weight, coarse = halve(weight), halve(total)
    coarse = coarse / np.maximum(coarse_weight, 1)[..., None]
    coarse = push_pull(coarse.astype(np.float32), coarse_weight > 0)
    fill = coarse.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return np.where(filled[..., None], image, fill)


def evaluate(albedo: Albedo, points: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """Return linear colours [N, 3] float32 of a colour field at points [N, 3], in chunks, without gradients."""
    result = np.empty((len(points), 3), dtype=np.float32)
    with torch.no_grad():
        for start in range(0, len(points), POINTS_PER_CALL):
            chunk = torch.from_numpy(np.ascontiguousarray(points[start : start + POINTS_PER_CALL], dtype=np.float32))
            colour = albedo(chunk.to(device))
            if tuple(colour.shape) != (len(chunk), 3):
                raise ValueError(f"albedo: wanted shape [{len(chunk)}, 3], got {list(colour.shape)}")
            result[start : start + POINTS_PER_CALL] = colour.detach().float().cpu().numpy()
    return result


def _to_texture(mesh: Mesh, colours_at: Callable[[np.ndarray, np.ndarray], np.ndarray], size: int) -> np.ndarray:
    """Texture [size, size, 3] uint8 sRGB from linear colours of (face, weights)."""
    if mesh.uv is None or mesh.uv_faces is None:
        raise ValueError("mesh: wanted texture coordinates, got none; unwrap it first")
    texel, face, weights = texel_points(mesh.uv, mesh.uv_faces, size)
    if len(texel) == 0:
        raise ValueError("mesh: its texture coordinates cover no texel")
    colours = colours_at(face, weights)
    good = np.isfinite(colours).all(axis=1)
    if (~good).mean() > BLEMISHES:
        why = f"{int((~good).sum())} of {len(good)} colours are not finite numbers"
        raise UserError("The texture could not be baked", why, "lower the learning rate of the colour field")
    if not good.all():
        log.warning("%d texels without a finite colour were filled from their neighbours", int((~good).sum()))
    image = np.zeros((size * size, 3), dtype=np.float32)
    image[texel[good]] = np.clip(colours[good], 0, 1)
    filled = np.zeros(size * size, dtype=bool)
    filled[texel[good]] = True
    image = push_pull(image.reshape(size, size, 3), filled.reshape(size, size))
    srgb = linear_to_srgb(torch.from_numpy(image)).numpy()
    return np.floor(srgb * 255 + 0.5).astype(np.uint8)


def bake(mesh: Mesh, albedo: Albedo, size: int, *, device: torch.device | str = "cpu") -> np.ndarray:
    """Bake a colour field over a mesh's surface into its texture.

    Args:
        mesh: with uv and uv_faces.
        albedo: [N, 3] world points -> [N, 3] linear RGB.
        size: texture side in texels.
        device: where `albedo` wants its points.
    Returns: texture [size, size, 3] uint8 sRGB, row 0 at the top.
    Raises: UserError if the field gives more than 1 % non-finite colours.
    """
    corners = mesh.vertices[mesh.faces]  # [F, 3, 3]

    def colours_at(face: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return evaluate(albedo, np.einsum("nc,nck->nk", weights, corners[face]), device)

    return _to_texture(mesh, colours_at, size)


def bake_vertex_colours(mesh: Mesh, size: int) -> np.ndarray:
    """Bake a mesh's own vertex colours, interpolated over its faces, into its texture; as `bake`."""
    if mesh.colours is None:
        raise ValueError("mesh: wanted vertex colours, got none")
    corners = mesh.colours[mesh.faces]
    return _to_texture(mesh, lambda face, weights: np.einsum("nc,nck->nk", weights, corners[face]), size)
