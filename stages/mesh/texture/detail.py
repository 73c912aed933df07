"""Carry the shape of a full surface onto a decimated one as pictures: a tangent-space normal map, ambient occlusion.

Every texel looks at the nearest place of the full surface that faces its way. The normal there is told in the frame of
the decimated mesh by the convention of tangents.py; the occlusion there is that of the full surface's vertices.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stages.mesh.mesh import Mesh
from stages.mesh.texture.bake import push_pull, texel_points
from stages.mesh.texture.tangents import corner_tangents
from stages.mesh.tree import TriangleTree

REACH = 0.5  # of the longest side of the box: what is further away throws no shade
STEEPEST = 0.05  # least share of a map's normal along the mesh's own: no texel faces backwards


def bake_detail(mesh: Mesh, full: Mesh, size: int, *, normals: bool = True, occlusion: bool = True) -> Mesh:
    """Return the mesh with a normal map and an occlusion map that hold what the full surface has and it lacks.

    Args:
        mesh: unwrapped, near the full surface.
        full: the surface that it was decimated from.
        size: side of the maps in texels.
        normals: whether to bake the normal map.
        occlusion: whether to bake the occlusion map.
    Raises: ValueError for a mesh without texture coordinates.
    """
    if mesh.uv is None or mesh.uv_faces is None:
        raise ValueError("mesh: wanted texture coordinates, got none; unwrap it first")
    texel, face, weights = texel_points(mesh.uv, mesh.uv_faces, size)
    tree = TriangleTree(full.vertices.astype(np.float64)[full.faces])
    outward = _mixed(mesh.vertex_normals().astype(np.float64)[mesh.faces[face]], weights)
    place, shares = tree.nearest(_mixed(mesh.vertices.astype(np.float64)[mesh.faces[face]], weights), outward)
    corners = full.faces[place]
    maps: dict[str, np.ndarray] = {}
    if normals:
        directions = _mixed(full.vertex_normals().astype(np.float64)[corners], shares)
        tangents = corner_tangents(mesh).astype(np.float64)
        image_normals = _in_frame(directions, outward, _mixed(tangents[face, :, :3], weights), tangents[face, 0, 3])
        image = _filled(image_normals, texel, size)
        image /= np.maximum(np.linalg.norm(image, axis=-1, keepdims=True), 1e-9)
        maps["normal_map"] = np.floor(127.5 * (image + 1) + 0.5).clip(0, 255).astype(np.uint8)
    if occlusion:
        reach = REACH * float(np.ptp(full.vertices[np.unique(full.faces)], axis=0).max())
        light = tree.open_share(full.vertices, full.vertex_normals(), reach)
        image = _filled(_mixed(light[corners][..., None], shares), texel, size)
        maps["occlusion"] = np.floor(255 * image[..., 0].clip(0, 1) + 0.5).astype(np.uint8)
    return replace(mesh, **maps)


def _mixed(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Values [N, 3, C] of corners mixed by barycentric weights [N, 3]: [N, C]."""
    return np.einsum("nc,nck->nk", weights.astype(np.float64), values)


def _in_frame(directions: np.ndarray, normals: np.ndarray, tangents: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Directions [N, 3] as unit vectors of the frames (t, b, n): what a reader turns into them again.

    t and n are as interpolated and not unit, and b = sign (n x t); the inverse is written out by cross products.
    """
    bitangents = sign[:, None] * np.cross(normals, tangents)
    rows = np.cross(bitangents, normals), np.cross(normals, tangents), np.cross(tangents, bitangents)
    coordinates = np.stack([np.einsum("nk,nk->n", row, directions) for row in rows], -1)
    coordinates *= sign[:, None]  # of the determinant, which is left out otherwise: only the direction counts
    length = np.linalg.norm(coordinates, axis=1, keepdims=True)
    coordinates = np.where(length > 1e-12, coordinates / np.maximum(length, 1e-12), [0.0, 0.0, 1.0])
    coordinates[:, 2] = np.maximum(coordinates[:, 2], STEEPEST)
    return coordinates / np.linalg.norm(coordinates, axis=1, keepdims=True)


def _filled(values: np.ndarray, texel: np.ndarray, size: int) -> np.ndarray:
    """A picture [size, size, C] with values [N, C] at texels [N], filled between them."""
    image, covered = np.zeros((size * size, values.shape[1]), np.float32), np.zeros(size * size, bool)
    image[texel], covered[texel] = values, True
    return push_pull(image.reshape(size, size, -1), covered.reshape(size, size))
