"""Shared parts of the file formats: the unindexed attributes, the seams split, the picture as PNG, colours as bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch

from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.mesh.clean import check_mesh
from stages.mesh.measure import edges_of
from stages.mesh.mesh import Material, Mesh
from stages.mesh.texture.tangents import corner_tangents, mirrored_faces

GENERATOR = "text3d-pipeline"
ROUGHNESS, METALLIC = 0.9, 0.0  # of what says nothing itself: priors know colours, no reflections


@dataclass(frozen=True)
class Surface:
    """A mesh with one index a corner: vertices are repeated where their texture coordinates differ.

    positions, normals [V, 3] float32; uv [V, 2] float32, v up, or None; colours [V, 3] float32 linear, or None; faces
    [F, 3] int64; source [V] the vertex of the mesh that each one comes from; tangents [V, 4] float32 with their sign,
    of a mesh with a normal map, or None (see stages.mesh.texture.tangents).
    """

    positions: np.ndarray
    normals: np.ndarray
    uv: np.ndarray | None
    colours: np.ndarray | None
    faces: np.ndarray
    source: np.ndarray
    tangents: np.ndarray | None = None


def textured(mesh: Mesh) -> bool:
    """Return whether the mesh has a texture and the coordinates to use it."""
    return mesh.texture is not None and mesh.uv is not None and mesh.uv_faces is not None


def material_groups(mesh: Mesh) -> list[tuple[Material, np.ndarray]]:
    """Return the mesh's materials in use, roughness and metalness filled in, each with its faces [n] in their order."""
    materials = mesh.materials or (Material("mesh", mesh.metallic, mesh.roughness),)
    of_face = np.zeros(len(mesh.faces), np.int32) if mesh.face_materials is None else mesh.face_materials
    groups = []
    for k, material in enumerate(materials):
        metallic = METALLIC if material.metallic is None else material.metallic
        roughness = ROUGHNESS if material.roughness is None else material.roughness
        groups.append((Material(material.name, metallic, roughness), np.flatnonzero(of_face == k)))
    return [group for group in groups if len(group[1])]


def split_seams(mesh: Mesh) -> Surface:
    """Make one vertex for each pair of vertex and texture coordinate in use; normals stay smooth across seams.

    With a normal map vertices are also apart where a chart meets its mirror image.
    """
    check_mesh(mesh)
    normals, tangents = mesh.vertex_normals(), None
    if textured(mesh):
        keys = [mesh.faces.reshape(-1), mesh.uv_faces.reshape(-1)]
        if mesh.normal_map is not None:
            keys.append(np.repeat(mirrored_faces(mesh), 3))
        used, first, faces = np.unique(np.stack(keys, -1), axis=0, return_index=True, return_inverse=True)
        source, uv = used[:, 0], mesh.uv[used[:, 1]]
        if mesh.normal_map is not None:
            tangents = corner_tangents(mesh).reshape(-1, 4)[first]
    else:
        source, faces = np.unique(mesh.faces, return_inverse=True)
        uv = None
    colours = None if mesh.colours is None else mesh.colours[source]
    positions = mesh.vertices[source].astype(np.float32)
    return Surface(positions, normals[source], uv, colours, faces.reshape(-1, 3), source, tangents)


def encloses(mesh: Mesh) -> bool:
    """Return whether the mesh is closed and faces outwards, so that nobody sees a face's back."""
    edges = edges_of(mesh.faces)
    return bool((edges.count == 2).all() and (edges.balance == 0).all()) and mesh.signed_volume() > 0


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
    """Return a uint8 image, [H, W, 3] or grey [H, W], as PNG, without metadata."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()
