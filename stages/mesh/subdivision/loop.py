"""Loop subdivision and its limit surface, as one sparse matrix from control vertices to surface points.

Loop 1987, "Smooth subdivision surfaces based on triangles"; creases and borders after Hoppe et al. 1994, sec. 3. One
step splits every triangle in four. Interior vertices of valence n keep 1 - n b of themselves and take b of each
neighbour, b = (5/8 - (3/8 + cos(2 pi / n) / 4)^2) / n; new ones on edges take 3/8 of the edge's ends and 1/8 of the two
corners opposite. The limit of an interior vertex is (1 - n c) v + c (sum of its neighbours), c = 1 / (n + 3 / (8 b)).
An edge with one face or more than two is a crease: its curve is the cubic B-spline (1/2 1/2; 1/8 3/4 1/8; limit 1/6 2/3
1/6), and a vertex where other than two creases meet stays where it is.
Since all of that is linear, the surface is a fixed matrix times the control vertices, and so is its gradient.

Letters: V control vertices, V' surface points, F faces, E edges, T texture coordinates.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_matrix, diags, identity, vstack
from scipy.sparse.linalg import spsolve
from torch import Tensor

from stages.mesh.measure import Edges, edges_of

CREASE = 2  # creases at a vertex on a crease curve


def limit_surface(faces: np.ndarray, vertices: int, levels: int) -> tuple[np.ndarray, csr_matrix]:
    """Return the faces [F 4^levels, 3] of a subdivided surface, and the matrix [V', V] to its limit positions.

    Args:
        faces: [F, 3] into `vertices` control vertices.
        levels: subdivisions; 0: the limit of the control vertices only.
    """
    _check(faces, vertices)
    matrix = identity(vertices, format="csr")
    for _ in range(levels):
        edges = edges_of(faces)
        matrix = _refine(faces, edges, matrix.shape[0]) @ matrix
        faces = children(faces, edges, matrix.shape[0] - len(edges.pairs))
    return faces.astype(np.int32), (limit_matrix(faces, matrix.shape[0]) @ matrix).tocsr()


def subdivide_linearly(values: np.ndarray, faces: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Split every triangle at its edges' middles; returns values [T, C] and faces.

    In the face order of :func:`limit_surface`: for texture coordinates of the subdivided surface.
    """
    for _ in range(levels):
        edges = edges_of(faces)
        faces = children(faces, edges, len(values))
        values = np.concatenate([values, values[edges.pairs].mean(1, dtype=values.dtype)])
    return values, faces.astype(np.int32)


def children(faces: np.ndarray, edges: Edges, vertices: int) -> np.ndarray:
    """Return four faces for each, wound the same: those at corners 0, 1 and 2, then the middle; [4 F, 3].

    The new vertex of edge e is `vertices` + e.
    """
    middle = vertices + edges.of_half_edge.reshape(-1, 3)  # on the edges 0-1, 1-2, 2-0
    a, b, c = faces[:, 0], faces[:, 1], faces[:, 2]
    m, n, o = middle[:, 0], middle[:, 1], middle[:, 2]
    split = [np.stack(face, -1) for face in ((a, m, o), (b, n, m), (c, o, n), (m, n, o))]
    return np.stack(split, 1).reshape(-1, 3)


def limit_matrix(faces: np.ndarray, vertices: int) -> csr_matrix:
    """Return the matrix [V, V] from the vertices of a mesh to their places on its limit surface."""
    edges = edges_of(faces)
    valence = np.bincount(edges.pairs.reshape(-1), minlength=vertices)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = 1 / (valence + 3 / (8 * _beta(valence)))
    return _vertex_rule(edges, vertices, valence, weight, crease=1 / 6)


def _refine(faces: np.ndarray, edges: Edges, vertices: int) -> csr_matrix:
    """One subdivision [V + E, V]: the old vertices, then one on each edge."""
    valence = np.bincount(edges.pairs.reshape(-1), minlength=vertices)
    old = _vertex_rule(edges, vertices, valence, _beta(valence), crease=1 / 8)
    smooth = edges.count == 2
    count = len(edges.pairs)
    ends = np.where(smooth, 3 / 8, 1 / 2)
    rows = [np.repeat(np.arange(count), 2)]
    columns, values = [edges.pairs.reshape(-1)], [np.repeat(ends, 2)]
    opposite = np.roll(faces, 1, axis=1).reshape(-1)  # the corner that half edge 3 f + k, from k to k + 1, leaves out
    inner = smooth[edges.of_half_edge]
    rows.append(edges.of_half_edge[inner])
    columns.append(opposite[inner])
    values.append(np.full(int(inner.sum()), 1 / 8))
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    return vstack([old, coo_matrix(entries, shape=(count, vertices))]).tocsr()


def _beta(valence: np.ndarray) -> np.ndarray:
    """Loop's weight of a neighbour; 0 for a vertex without any."""
    n = np.maximum(valence, 1)
    return np.where(valence > 0, (5 / 8 - (3 / 8 + np.cos(2 * np.pi / n) / 4) ** 2) / n, 0.0)


def _vertex_rule(edges: Edges, vertices: int, valence: np.ndarray, weight: np.ndarray, crease: float) -> csr_matrix:
    """Rows 1 - n w of a vertex and w of its n neighbours; on creases their own rule, at corners the vertex itself."""
    sharp = edges.count != 2
    creases = np.bincount(edges.pairs[sharp].reshape(-1), minlength=vertices)
    weight = np.where((creases == 0) & (valence > 0), weight, 0.0)
    along = np.where(creases == CREASE, crease, 0.0)
    a, b = np.concatenate([edges.pairs, edges.pairs[:, ::-1]]).T  # both directions: a takes of b
    share = np.where(np.concatenate([sharp, sharp]), along[a], 0.0) + weight[a]
    off = coo_matrix((share, (a, b)), shape=(vertices, vertices)).tocsr()
    off.eliminate_zeros()
    return (off + diags(1 - np.asarray(off.sum(1))[:, 0])).tocsr()


def control_of(faces: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return control vertices [V, 3] float64 whose limit surface passes through the given positions [V, 3]."""
    _check(faces, len(positions))
    control = spsolve(limit_matrix(faces, len(positions)).tocsc(), positions.astype(np.float64))
    return np.ascontiguousarray(control.reshape(-1, 3))


def as_torch(matrix: csr_matrix, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Return the matrix as a coalesced torch.sparse tensor; torch.sparse.mm(matrix, control) is differentiable."""
    entries = matrix.tocoo()
    index = torch.from_numpy(np.stack([entries.row, entries.col]).astype(np.int64))
    values = torch.from_numpy(entries.data).to(dtype)
    return torch.sparse_coo_tensor(index, values, entries.shape, check_invariants=True).coalesce().to(device)


def icosphere(levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a unit sphere of 10 * 4^levels + 2 vertices [V, 3] float64 and faces [F, 3] int32, facing outwards."""
    ratio = (1 + 5**0.5) / 2
    corners = [(0, s, t * ratio) for s in (-1, 1) for t in (-1, 1)]
    points = np.array([np.roll(corner, k) for k in range(3) for corner in corners], np.float64)
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    near = np.isclose(distance, 2.0)  # an icosahedron's edges
    faces = [
        (i, j, k)
        for i in range(12)
        for j in range(i + 1, 12)
        for k in range(j + 1, 12)
        if near[i, j] and near[j, k] and near[i, k]
    ]
    outward = [f if np.linalg.det(points[list(f)]) > 0 else (f[0], f[2], f[1]) for f in faces]
    faces = np.array(outward, np.int64)
    for _ in range(levels):
        points, faces = subdivide_linearly(points / np.linalg.norm(points, axis=1, keepdims=True), faces, 1)
    return points / np.linalg.norm(points, axis=1, keepdims=True), faces.astype(np.int32)


def _check(faces: np.ndarray, vertices: int) -> None:
    if faces.ndim != 2 or faces.shape[1] != 3 or len(faces) == 0:
        raise ValueError(f"faces: wanted shape [F, 3] with F > 0, got {list(faces.shape)}")
    if faces.min() < 0 or faces.max() >= vertices:
        raise ValueError(f"faces: wanted indices in [0, {vertices}), got {faces.min()} to {faces.max()}")
