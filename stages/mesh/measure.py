"""Measures of a triangle mesh: closedness, manifoldness, orientation, components, Euler number, volume.

Letters: V vertices in use, E undirected edges, F faces. An edge is a pair of vertex indices; a half edge is one side
of a face, directed the way the face winds. All counts treat equal positions with different indices as different.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from stages.mesh.mesh import Mesh


@dataclass(frozen=True)
class MeshReport:
    """The topology and size of a mesh; lengths in world units."""

    vertices: int  # used by at least one face
    faces: int
    components: int  # connected through shared vertices
    boundary_edges: int  # edges with exactly one face
    nonmanifold_edges: int  # edges with three or more faces
    nonmanifold_vertices: int  # vertices whose faces form more than one fan
    misoriented_edges: int  # edges that two faces run through in the same direction
    degenerate_faces: int  # a repeated vertex index, or no area
    euler_number: int  # V - E + F
    area: float
    volume: float  # signed; only meaningful for a closed, oriented surface
    bounds: tuple[tuple[float, float, float], tuple[float, float, float]]

    @property
    def watertight(self) -> bool:
        """Every edge has exactly two faces."""
        return self.faces > 0 and self.boundary_edges == 0 and self.nonmanifold_edges == 0

    @property
    def manifold(self) -> bool:
        """Every edge has at most two faces and the faces of every vertex form one fan."""
        return self.nonmanifold_edges == 0 and self.nonmanifold_vertices == 0

    @property
    def oriented(self) -> bool:
        """The two faces of every edge run through it in opposite directions."""
        return self.misoriented_edges == 0

    @property
    def solid(self) -> bool:
        """The boundary of a body: closed, manifold, consistently oriented, facing outwards."""
        return self.watertight and self.manifold and self.oriented and self.volume > 0

    def as_dict(self) -> dict[str, object]:
        """Return all numbers and verdicts, ready for JSON."""
        verdicts = {k: getattr(self, k) for k in ("watertight", "manifold", "oriented", "solid")}
        return asdict(self) | verdicts


@dataclass(frozen=True)
class Edges:
    """The undirected edges of a mesh, sorted by their two vertices.

    pairs [E, 2]: smaller index first. of_half_edge [3F]: the edge of half edge 3 f + k, which runs from corner k of
    face f to corner k + 1. count [E]: faces at the edge. balance [E]: half edges running from the smaller index to
    the larger, minus those running back; 0 where two faces agree.
    """

    pairs: np.ndarray
    of_half_edge: np.ndarray
    count: np.ndarray
    balance: np.ndarray


def edges_of(faces: np.ndarray) -> Edges:
    """Return edges of `faces` [F, 3] with their face counts and orientation balance."""
    start, end = faces.reshape(-1).astype(np.int64), np.roll(faces, -1, axis=1).reshape(-1).astype(np.int64)
    low, high = np.minimum(start, end), np.maximum(start, end)
    base = int(high.max()) + 1 if len(high) else 1
    keys, of_half_edge, count = np.unique(low * base + high, return_inverse=True, return_counts=True)
    direction = np.where(start < end, 1, -1)
    balance = np.bincount(of_half_edge, weights=direction, minlength=len(keys)).astype(np.int64)
    return Edges(np.stack([keys // base, keys % base], -1), of_half_edge, count, balance)


def adjacent_faces(edges: Edges) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of half edges [P, 2] that share a two-face edge, and the edge [P] between them, in edge order."""
    inner = np.flatnonzero(edges.count == 2)
    order = np.argsort(edges.of_half_edge, kind="stable")
    first = np.concatenate([[0], np.cumsum(edges.count)])[inner]
    return np.stack([order[first], order[first + 1]], -1), inner


def label_components(nodes: int, links: np.ndarray) -> tuple[int, np.ndarray]:
    """Return connected components of an undirected graph: how many, and the label [nodes] of each node.

    Args:
        nodes: number of nodes.
        links: [L, 2] node indices.
    """
    graph = coo_matrix((np.ones(len(links), dtype=np.int8), (links[:, 0], links[:, 1])), shape=(nodes, nodes))
    count, labels = connected_components(graph, directed=False)
    return int(count), labels


def face_components(faces: np.ndarray, vertices: int) -> np.ndarray:
    """Return the component label [F] of each face, 0.. by first appearance; connected through shared vertices."""
    links = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]])
    _, labels = label_components(vertices, links)
    _, first, inverse = np.unique(labels[faces[:, 0]], return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def face_areas(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return areas [F] in float64."""
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def face_volumes(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return signed volumes [F] of the tetrahedra from the mean corner; a closed component's sum is its volume."""
    corners = vertices[faces].astype(np.float64)  # [F, 3, 3]
    a, b, c = (corners - corners.mean(axis=(0, 1))).swapaxes(0, 1)
    return np.einsum("ij,ij->i", a, np.cross(b, c)) / 6


def _nonmanifold_vertices(faces: np.ndarray, edges: Edges) -> int:
    """Vertices whose corners fall into more than one group when joined across shared edges."""
    pairs, _ = adjacent_faces(edges)
    f, k = pairs // 3, pairs % 3
    flat = faces.reshape(-1)
    links = []
    for end in (0, 1):  # the corner of face 1 at this end of face 0's half edge is at one end of its own half edge
        corner0 = f[:, 0] * 3 + (k[:, 0] + end) % 3
        near, far = f[:, 1] * 3 + k[:, 1], f[:, 1] * 3 + (k[:, 1] + 1) % 3
        links.append(np.stack([corner0, np.where(flat[near] == flat[corner0], near, far)], -1))
    _, fan = label_components(len(flat), np.concatenate(links))
    fans = np.unique(np.stack([flat.astype(np.int64), fan], -1), axis=0)[:, 0]
    return int((np.bincount(fans) > 1).sum())


def measure(mesh: Mesh) -> MeshReport:
    """Measure a mesh exactly (integers) and in float64 (area, volume).

    Returns: a report; an empty mesh gives zeros, never an error.
    """
    faces = mesh.faces
    if len(faces) == 0:
        return MeshReport(0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, ((0.0,) * 3, (0.0,) * 3))
    repeated = (faces == np.roll(faces, 1, axis=1)).any(axis=1)
    areas = face_areas(mesh.vertices, faces)
    edges = edges_of(faces)
    used = np.unique(faces)
    points = mesh.vertices[used].astype(np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    return MeshReport(
        vertices=len(used),
        faces=len(faces),
        components=int(face_components(faces, len(mesh.vertices)).max()) + 1,
        boundary_edges=int((edges.count == 1).sum()),
        nonmanifold_edges=int((edges.count > 2).sum()),
        nonmanifold_vertices=_nonmanifold_vertices(faces, edges),
        misoriented_edges=int(((edges.count == 2) & (edges.balance != 0)).sum()),
        degenerate_faces=int((repeated | (areas <= 1e-14 * float(((high - low) ** 2).sum()))).sum()),
        euler_number=len(used) - len(edges.pairs) + len(faces),
        area=float(areas.sum()),
        volume=float(face_volumes(mesh.vertices, faces).sum()),
        bounds=(tuple(low.tolist()), tuple(high.tolist())),
    )
