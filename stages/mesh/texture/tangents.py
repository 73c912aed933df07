"""Tangents by the MikkTSpace convention, so that a normal map reads the same in every program that keeps to it.

The tangent of a face is its direction of growing u. At a vertex those of its faces are laid into the plane square to
the normal, made unit, and summed with the faces' angles there as weights. Faces share a sum where they share position,
normal and texture coordinate and are not mirrored against each other; the fourth number is -1 in mirrored charts. A
picture's normal m is then m.x t + m.y b + m.z n with b = sign (n x t), all as interpolated, made unit at the end.

Source: Mikkelsen, Simulation of Wrinkled Surfaces Revisited (2008), and its reference code; glTF 2.0 sec. 3.7.2.1.
"""

from __future__ import annotations

import numpy as np

from stages.mesh.mesh import Mesh


def corner_tangents(mesh: Mesh) -> np.ndarray:
    """Return unit tangents with their sign [F, 3, 4] float32 of every corner; towards +x or +z where no face gives one.

    Args:
        mesh: with texture coordinates, v up.
    """
    normals = mesh.vertex_normals().astype(np.float64)[mesh.faces]  # [F, 3, 3]
    points = mesh.vertices.astype(np.float64)[mesh.faces]
    uv = mesh.uv.astype(np.float64)[mesh.uv_faces]
    (a, b), (d, s) = ((x[:, 1] - x[:, 0], x[:, 2] - x[:, 0]) for x in (points, uv))
    area = d[:, 0] * s[:, 1] - s[:, 0] * d[:, 1]
    sign = np.where(area < 0, -1.0, 1.0)
    along = _unit((a * s[:, 1:] - b * d[:, 1:]) * sign[:, None])  # [F, 3]
    flat = _unit(_laid(np.broadcast_to(along[:, None], normals.shape), normals))
    to_next, to_last = (_unit(_laid(np.roll(points, k, axis=1) - points, normals)) for k in (-1, 1))
    angle = np.arccos(np.clip(np.einsum("fck,fck->fc", to_next, to_last), -1, 1))
    angle[area == 0] = 0.0

    _, place = np.unique(np.concatenate([mesh.vertices, mesh.vertex_normals()], 1), axis=0, return_inverse=True)
    _, spot = np.unique(mesh.uv, axis=0, return_inverse=True)
    keys = [place.reshape(-1)[mesh.faces], spot.reshape(-1)[mesh.uv_faces], np.repeat(sign < 0, 3).reshape(-1, 3)]
    _, group = np.unique(np.stack(keys, -1).reshape(-1, 3), axis=0, return_inverse=True)
    group = group.reshape(-1)
    weighted = (flat * angle[..., None]).reshape(-1, 3)
    total = np.stack([np.bincount(group, weighted[:, k]) for k in range(3)], -1)[group].reshape(normals.shape)
    axis = np.where(np.abs(normals[..., :1]) < 0.9, [1.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    none = np.linalg.norm(total, axis=-1, keepdims=True) < 1e-9
    result = _unit(np.where(none, _laid(axis, normals), total))
    return np.concatenate([result, np.repeat(sign, 3).reshape(-1, 3, 1)], -1).astype(np.float32)


def mirrored_faces(mesh: Mesh) -> np.ndarray:
    """Return which faces [F] bool see their part of the texture mirrored."""
    a, b, c = mesh.uv.astype(np.float64)[mesh.uv_faces].swapaxes(0, 1)
    return (b - a)[:, 0] * (c - a)[:, 1] - (c - a)[:, 0] * (b - a)[:, 1] < 0


def _laid(directions: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Directions without what of them runs along the normals."""
    return directions - normals * np.einsum("...k,...k->...", directions, normals)[..., None]


def _unit(directions: np.ndarray) -> np.ndarray:
    return directions / np.maximum(np.linalg.norm(directions, axis=-1, keepdims=True), 1e-30)
