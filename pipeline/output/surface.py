"""Shared parts of the file formats: the unindexed attributes, the seams split, the picture as PNG, colours as bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch

from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.mesh.clean import check_mesh
from stages.mesh.measure import edges_of
from stages.mesh.mesh import Mesh

GENERATOR = "text3d-pipeline"


@dataclass(frozen=True)
class Surface:
    """A mesh with one index a corner: vertices are repeated where their texture coordinates differ.

    positions, normals [V, 3] float32; uv [V, 2] float32, v up, or None; colours [V, 3] float32 linear, or None; faces
    [F, 3] int64; source [V] the vertex of the mesh that each one comes from.
    """

    positions: np.ndarray
    normals: np.ndarray
    uv: np.ndarray | None
    colours: np.ndarray | None
    faces: np.ndarray
    source: np.ndarray


def textured(mesh: Mesh) -> bool:
    """Return whether the mesh has a texture and the coordinates to use it."""
    return mesh.texture is not None and mesh.uv is not None and mesh.uv_faces is not None


def split_seams(mesh: Mesh) -> Surface:
    """Make one vertex for each pair of vertex and texture coordinate in use; normals stay smooth across seams."""
    check_mesh(mesh)
    normals = mesh.vertex_normals()
    if textured(mesh):
        pairs = np.stack([mesh.faces.reshape(-1), mesh.uv_faces.reshape(-1)], -1)
        used, faces = np.unique(pairs, axis=0, return_inverse=True)
        source, uv = used[:, 0], mesh.uv[used[:, 1]]
    else:
        source, faces = np.unique(mesh.faces, return_inverse=True)
        uv = None
    colours = None if mesh.colours is None else mesh.colours[source]
    return Surface(mesh.vertices[source].astype(np.float32), normals[source], uv, colours, faces.reshape(-1, 3), source)


def encloses(mesh: Mesh) -> bool:
    """Return whether the mesh is closed and faces outwards, so that nobody sees a face's back."""
    edges = edges_of(mesh.faces)
    return bool((edges.count == 2).all() and (edges.balance == 0).all()) and mesh.signed_volume() > 0


def tangents(surface: Surface) -> np.ndarray:
    """Return unit directions of growing u, square to the normals, and the handedness that glTF wants, [V, 4] float32.

    n x t times the fourth number points along growing v (up); it is -1 where a chart is mirrored. Towards +x or +z
    where the texture coordinates give no direction.
    """
    p, q = surface.positions[surface.faces].astype(np.float64), surface.uv[surface.faces].astype(np.float64)
    (edge, other), (d, s) = (p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]), (q[:, 1] - q[:, 0], q[:, 2] - q[:, 0])
    area = d[:, 0] * s[:, 1] - s[:, 0] * d[:, 1]
    along = np.sign(area)[:, None] * (edge * s[:, 1:] - other * d[:, 1:])
    along *= (np.abs(area) / np.maximum(np.linalg.norm(along, axis=1), 1e-30))[:, None]
    total, signed = np.zeros(surface.positions.shape), np.zeros(len(surface.positions))
    for k in range(3):
        np.add.at(total, surface.faces[:, k], along)
        np.add.at(signed, surface.faces[:, k], area)
    normals = surface.normals.astype(np.float64)
    axis = np.where(np.abs(normals[:, :1]) < 0.9, [[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]])
    spare, flat = (d - normals * np.einsum("vk,vk->v", d, normals)[:, None] for d in (axis, total))
    flat = np.where(np.linalg.norm(flat, axis=1, keepdims=True) > 1e-12, flat, spare)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    return np.concatenate([flat, np.where(signed < 0, -1.0, 1.0)[:, None]], axis=1).astype(np.float32)


def vertex_colours(mesh: Mesh) -> np.ndarray | None:
    """Linear colours [V, 3] of the vertices: their own, else looked up in the texture, else None."""
    if mesh.colours is not None:
        return mesh.colours
    if not textured(mesh):
        return None
    height, width = mesh.texture.shape[:2]
    column = np.clip((mesh.uv[:, 0] * width).astype(int), 0, width - 1)
    row = np.clip(((1 - mesh.uv[:, 1]) * height).astype(int), 0, height - 1)
    srgb = mesh.texture[row, column].astype(np.float32) / 255
    linear = srgb_to_linear(torch.from_numpy(srgb)).numpy()[mesh.uv_faces.reshape(-1)]
    corners = mesh.faces.reshape(-1)
    total = np.zeros((len(mesh.vertices), 3))
    np.add.at(total, corners, linear)
    count = np.bincount(corners, minlength=len(mesh.vertices))
    return (total / np.maximum(count, 1)[:, None]).astype(np.float32)


def srgb_bytes(linear: np.ndarray) -> np.ndarray:
    """Linear colours in [0, 1] as sRGB uint8."""
    srgb = linear_to_srgb(torch.from_numpy(np.ascontiguousarray(linear, dtype=np.float32))).numpy()
    return np.floor(srgb * 255 + 0.5).astype(np.uint8)


def png_bytes(image: np.ndarray) -> bytes:
    """Return a uint8 [H, W, 3] image as PNG, without metadata."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()
