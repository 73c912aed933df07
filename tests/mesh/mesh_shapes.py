"""Test meshes with known topology: closed forms, and isosurfaces as rough as an optimiser's output; whole lattices."""

from __future__ import annotations

import numpy as np

from stages.mesh.mesh import Mesh
from stages.mesh.tets.tetrahedra import Lattice

# Kuhn's six tetrahedra of a cube, corners numbered x + 2 y + 4 z; every face diagonal agrees with its neighbour's.
_KUHN = np.array([[0, 1, 3, 7], [0, 3, 2, 7], [0, 2, 6, 7], [0, 6, 4, 7], [0, 4, 5, 7], [0, 5, 1, 7]])


def make(vertices, faces) -> Mesh:
    return Mesh(np.asarray(vertices, dtype=np.float32), np.asarray(faces, dtype=np.int32))


def join(*meshes: Mesh) -> Mesh:
    offsets = np.cumsum([0] + [len(m.vertices) for m in meshes[:-1]])
    return make(
        np.concatenate([m.vertices for m in meshes]), np.concatenate([m.faces + o for m, o in zip(meshes, offsets)])
    )


def moved(mesh: Mesh, offset, scale: float = 1.0) -> Mesh:
    return make(mesh.vertices * scale + np.asarray(offset, dtype=np.float32), mesh.faces)


def tetrahedron() -> Mesh:
    return make([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


def box(size=(1.0, 1.0, 1.0)) -> Mesh:
    """Twelve faces, outward, corners numbered x + 2 y + 4 z."""
    corners = np.array([[x, y, z] for z in (-0.5, 0.5) for y in (-0.5, 0.5) for x in (-0.5, 0.5)]) * size
    quads = [[0, 2, 3, 1], [4, 5, 7, 6], [0, 1, 5, 4], [2, 6, 7, 3], [0, 4, 6, 2], [1, 3, 7, 5]]
    return make(corners, [f for q in quads for f in ([q[0], q[1], q[2]], [q[0], q[2], q[3]])])


def torus(major: float = 0.6, minor: float = 0.2, n: int = 64, m: int = 32) -> Mesh:
    u, v = np.meshgrid(np.arange(n) * 2 * np.pi / n, np.arange(m) * 2 * np.pi / m, indexing="ij")
    ring = major + minor * np.cos(v)
    vertices = np.stack([ring * np.cos(u), minor * np.sin(v), ring * np.sin(u)], -1).reshape(-1, 3)
    i, j = (g.reshape(-1) for g in np.meshgrid(np.arange(n), np.arange(m), indexing="ij"))
    a, b, c, d = i * m + j, (i + 1) % n * m + j, (i + 1) % n * m + (j + 1) % m, i * m + (j + 1) % m
    return make(vertices, np.concatenate([np.stack([a, c, b], -1), np.stack([a, d, c], -1)]))


def sphere(radius: float = 0.7, n: int = 48, m: int = 24) -> Mesh:
    """Latitude rings with two poles."""
    theta = np.arange(1, m) * np.pi / m
    u, t = np.meshgrid(np.arange(n) * 2 * np.pi / n, theta, indexing="ij")
    rings = np.stack([np.sin(t) * np.sin(u), np.cos(t), np.sin(t) * np.cos(u)], -1).reshape(-1, 3)
    vertices = np.concatenate([rings, [[0, 1, 0], [0, -1, 0]]]) * radius
    faces = []
    for i in range(n):
        p, q = i * (m - 1), (i + 1) % n * (m - 1)
        faces.append([len(rings), p, q])
        faces.append([len(rings) + 1, q + m - 2, p + m - 2])
        for j in range(m - 2):
            faces += [[p + j, p + j + 1, q + j + 1], [p + j, q + j + 1, q + j]]
    return make(vertices, faces)


def isosurface(sdf, resolution: int) -> Mesh:
    """Marching tetrahedra of `sdf` ([N, 3] -> [N], negative inside) over [-1, 1]^3: closed, full of slivers."""
    n = resolution + 1
    axis = np.linspace(-1, 1, n)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).transpose(2, 1, 0, 3).reshape(-1, 3)
    value = sdf(grid)
    inside = value < 0
    corner = np.array([x + y * n + z * n * n for z in (0, 1) for y in (0, 1) for x in (0, 1)])
    i = np.arange(resolution)
    cells = (i[None, None, :] + i[None, :, None] * n + i[:, None, None] * n * n).reshape(-1)
    tets = (cells[:, None, None] + corner[_KUHN][None]).reshape(-1, 4)
    tets = tets[inside[tets].any(1) & ~inside[tets].all(1)]
    order = np.argsort(~inside[tets], axis=1, kind="stable")  # inside corners first
    tets, count = np.take_along_axis(tets, order, 1), inside[tets].sum(1)
    patterns = {1: [[(0, 1), (0, 2), (0, 3)]], 3: [[(3, 0), (3, 1), (3, 2)]]}
    patterns[2] = [[(0, 2), (0, 3), (1, 3)], [(0, 2), (1, 3), (1, 2)]]
    ends, middle = [], []
    for k, triangles in patterns.items():
        chosen = tets[count == k]
        for triangle in triangles:
            ends.append(np.stack([chosen[:, list(pair)] for pair in triangle], 1))
            out = grid[chosen[:, k:]].mean(1) - grid[chosen[:, :k]].mean(1)
            middle.append(out)
    ends, outward = np.sort(np.concatenate(ends), axis=2), np.concatenate(middle)
    keys, faces = np.unique(ends[..., 0].astype(np.int64) * len(grid) + ends[..., 1], return_inverse=True)
    faces = faces.reshape(-1, 3)
    a, b = keys // len(grid), keys % len(grid)
    t = np.clip(value[a] / (value[a] - value[b]), 0.02, 0.98)[:, None]
    vertices = grid[a] * (1 - t) + grid[b] * t
    p = vertices[faces]
    flip = np.einsum("ij,ij->i", np.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]), outward) < 0
    faces[flip] = faces[flip][:, ::-1]
    return make(vertices, faces)


def noisy_blob(resolution: int = 48, amplitude: float = 0.06) -> Mesh:
    """A bumpy sphere; resolution 48 gives about 30,000 faces."""

    def sdf(p):
        bumps = np.sin(17 * p[:, 0] + 1) * np.sin(19 * p[:, 1] + 2) * np.sin(16 * p[:, 2] + 3)
        return np.linalg.norm(p, axis=1) - 0.7 - amplitude * bumps

    return isosurface(sdf, resolution)


def _box_sdf(p, centre, half):
    q = np.abs(p - centre) - half
    return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0)


def table(resolution: int = 48) -> Mesh:
    """A thin top on four thin legs: one component, genus 0."""

    def sdf(p):
        d = _box_sdf(p, np.array([0, 0.35, 0]), np.array([0.7, 0.06, 0.5]))
        for x in (-0.6, 0.6):
            for z in (-0.4, 0.4):
                d = np.minimum(d, _box_sdf(p, np.array([x, -0.1, z]), np.array([0.05, 0.5, 0.05])))
        return d

    return isosurface(sdf, resolution)


def all_ids(lattice: Lattice) -> np.ndarray:
    """Every id of a lattice, sorted; as large as the cube, which the code under test never is."""
    axes = [np.arange(parity, 2 * lattice.resolution + 1, 2) for parity in (0, 1)]
    grids = [np.stack(np.meshgrid(a, a, a, indexing="ij"), -1).reshape(-1, 3) for a in axes]
    return np.sort(lattice.ids(np.concatenate(grids)))
