"""Pictures of a mesh's normals as a reader of its files draws them, with or without its normal map."""

from __future__ import annotations

import numpy as np
import torch

from stages.cameras import Views, to_clip
from stages.kernels.raster import interpolate, rasterise, texture
from stages.mesh.mesh import Mesh
from stages.mesh.texture.tangents import corner_tangents


def normals_seen(mesh: Mesh, view: Views, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals [size, size, 3] of one view and where the mesh is [size, size] bool.

    The map is read as glTF 2.0 says: m.x t + m.y b + m.z n with b = sign (n x t), bilinear.
    """
    vertices = torch.from_numpy(np.ascontiguousarray(mesh.vertices))
    faces = torch.from_numpy(mesh.faces).int()
    rast = rasterise(to_clip(vertices, view), faces, size, size)
    seen = (rast[..., 3] > 0).reshape(size, size)
    normals = interpolate(torch.from_numpy(mesh.vertex_normals().copy()), rast, faces).reshape(size, size, 3)
    if mesh.normal_map is not None:
        corners = torch.from_numpy(corner_tangents(mesh).reshape(-1, 4))
        of_corner = torch.arange(3 * len(faces), dtype=torch.int32).reshape(-1, 3)
        tangents = interpolate(corners, rast, of_corner).reshape(size, size, 4)
        uv = interpolate(torch.from_numpy(mesh.uv), rast, torch.from_numpy(mesh.uv_faces).int()).flatten(0, 2)
        told = (texture(torch.from_numpy(mesh.normal_map).float() / 127.5 - 1, uv)).reshape(size, size, 3)
        bitangents = tangents[..., 3:].sign() * torch.linalg.cross(normals, tangents[..., :3])
        normals = told[..., :1] * tangents[..., :3] + told[..., 1:2] * bitangents + told[..., 2:] * normals
    return torch.nn.functional.normalize(normals, dim=-1).numpy(), seen.numpy()


def normal_error_deg(mesh: Mesh, full: Mesh, views: Views, size: int = 256) -> float:
    """Mean angle in degrees between the normals of both, over the pixels of all views where both are."""
    angles = []
    for k in range(len(views)):
        (a, in_a), (b, in_b) = normals_seen(mesh, views[k : k + 1], size), normals_seen(full, views[k : k + 1], size)
        both = in_a & in_b
        angles.append(np.degrees(np.arccos(np.clip((a[both] * b[both]).sum(-1), -1, 1))))
    return float(np.concatenate(angles).mean())
