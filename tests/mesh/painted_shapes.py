"""Meshes with a texture, with bumps and with colours, for the tests of the files that hold them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stages.mesh.mesh import Mesh
from stages.mesh.texture.charts import unwrap_by_boxes
from tests.mesh.mesh_shapes import box, torus


def textured_torus(size: int = 64) -> Mesh:
    mesh = torus(n=24, m=12)
    uv, uv_faces, _ = unwrap_by_boxes(mesh, size, 2)
    ramp = np.arange(size, dtype=np.uint8) * (255 // size)
    texture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(40)), -1)
    return replace(mesh, uv=uv, uv_faces=uv_faces, texture=np.ascontiguousarray(texture))


def bumpy_torus(mirror: bool = False) -> Mesh:
    mesh = textured_torus()
    bumps = np.full((16, 16, 3), (160, 128, 240), np.uint8)
    uv = mesh.uv * np.float32([-1, 1]) + np.float32([1, 0]) if mirror else mesh.uv
    return replace(mesh, normal_map=bumps, uv=uv)


def coloured_box() -> Mesh:
    mesh = box()
    return replace(mesh, colours=np.clip(mesh.vertices + 0.5, 0, 1))
