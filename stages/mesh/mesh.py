"""The triangle mesh that leaves the toolkit: plain numpy arrays, no behaviour beyond measuring itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Material:
    """A part's own material as its file has it; what the surface looks like beside its colour.

    Args:
        name: of the file.
        metallic: in [0, 1]; None where the file does not say.
        roughness: likewise.
    """

    name: str
    metallic: float | None = None
    roughness: float | None = None


@dataclass
class Mesh:
    """An indexed triangle mesh, counter-clockwise faces seen from outside, y up, front towards +z.

    Args:
        vertices: [V, 3] float32.
        faces: [F, 3] int32.
        colours: [V, 3] float32 linear RGB in [0, 1], or None.
        uv: [T, 2] float32 in [0, 1], origin at the texture's lower left, or None.
        uv_faces: [F, 3] int32 into uv, or None.
        texture: [H, W, 3] uint8 sRGB, row 0 at the top (v = 1), or None.
        normals: [V, 3] float32 unit, in place of those that follow from the faces, or None.
        normal_map: [H, W, 3] uint8, 127.5 (n + 1) of unit normals in the texture's own space: x along u, y along v, z
            outwards; row 0 at the top, or None. It has no meaning without uv and texture.
        occlusion: [H, W] uint8, 255 times the share of the sky that the surface sees; row 0 at the top, or None.
            Likewise.
        metallic: of the whole surface, in [0, 1]; None where no file gives it.
        roughness: likewise.
        materials: of a user's mesh that has several, or None: one material of the two numbers above.
        face_materials: [F] int32 into materials, or None without any.
    """

    vertices: np.ndarray
    faces: np.ndarray
    colours: np.ndarray | None = None
    uv: np.ndarray | None = None
    uv_faces: np.ndarray | None = None
    texture: np.ndarray | None = None
    normals: np.ndarray | None = None
    normal_map: np.ndarray | None = None
    occlusion: np.ndarray | None = None
    metallic: float | None = None
    roughness: float | None = None
    materials: tuple[Material, ...] | None = None
    face_materials: np.ndarray | None = None

    def face_normals(self) -> np.ndarray:
        """Return unit normals [F, 3]; zero for a degenerate face."""
        vertices = self._of_handy_size()
        a, b, c = (vertices[self.faces[:, k]] for k in range(3))
        n = np.cross(b - a, c - a)
        return n / np.maximum(np.linalg.norm(n, axis=1, keepdims=True), 1e-20)

    def vertex_normals(self) -> np.ndarray:
        """Return the mesh's own unit normals [V, 3], else area-weighted ones; +y where no face gives one."""
        if self.normals is not None:
            return self.normals
        vertices = self._of_handy_size()
        a, b, c = (vertices[self.faces[:, k]].astype(np.float64) for k in range(3))
        n = np.cross(b - a, c - a)
        total = np.zeros((len(self.vertices), 3))
        for k in range(3):
            np.add.at(total, self.faces[:, k], n)
        length = np.linalg.norm(total, axis=1, keepdims=True)
        return np.where(length > 1e-20, total / np.maximum(length, 1e-20), [0.0, 1.0, 0.0]).astype(np.float32)

    def _of_handy_size(self) -> np.ndarray:
        """The vertices; where products of them would leave float32, scaled by a power of two, which no normal sees."""
        reach = float(np.abs(self.vertices).max(initial=0.0))
        if not 0 < reach < np.inf or 1e-8 < reach < 1e8:
            return self.vertices
        return np.ldexp(self.vertices, -int(np.frexp(reach)[1]))

    def signed_volume(self) -> float:
        """Return the volume by the divergence theorem; positive for a closed surface facing outwards."""
        a, b, c = (self.vertices[self.faces[:, k]].astype(np.float64) for k in range(3))
        return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)
