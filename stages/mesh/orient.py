"""A user's triangles made consistent: equal positions welded, neighbours facing the same way, outwards, creased.

Files differ from an optimiser's surface: vertices are repeated along texture seams and creases, faces may wind both
ways, surfaces may be open. Nothing here moves a vertex. Letters: V vertices, F faces.
"""

from __future__ import annotations

import logging

import numpy as np

from stages.mesh.measure import adjacent_faces, edges_of, face_areas, face_components, label_components
from stages.mesh.mesh import Mesh
from stages.mesh.tree import TriangleTree

log = logging.getLogger(__name__)

NEAR = 1e-3  # of a face's size: how far from it its outside is looked at
CREASE_DEG = 40.0  # edges bent by more than this are sharp


def welded_faces(mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct positions [V, 3] in sorted order and the faces [F, 3] int64 among them."""
    positions, place = np.unique(mesh.vertices, axis=0, return_inverse=True)
    return positions, place.reshape(-1)[mesh.faces]


def turned(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return which faces [F] bool must be turned over so that neighbours agree and bodies face outwards.

    Neighbours are faces with a common edge of two faces. Each connected piece that is not consistent is made so, where
    it can be (a Moebius strip cannot), and faced outwards by its volume about its own middle. Then everything is turned
    where the whole volume is negative, and last each closed piece that faces inwards without lying inside the others:
    one that does is a cavity.
    """
    edges = edges_of(faces)
    pairs, edge = adjacent_faces(edges)
    pairs, count = pairs // 3, len(faces)
    apart = edges.balance[edge] != 0  # the two run through their edge in the same direction
    _, piece = label_components(count, pairs)
    # every face twice, as it is and turned over: agreeing copies are joined
    links = np.concatenate([np.stack([pairs[:, 0], pairs[:, 1] + count * apart], -1),
                            np.stack([pairs[:, 0] + count, pairs[:, 1] + count * ~apart], -1)])  # fmt: skip
    _, copy = label_components(2 * count, links)
    _, root = np.unique(piece, return_index=True)  # first face of each piece
    mixed = np.zeros(len(root), dtype=bool)
    mixed[piece[pairs[apart, 0]]] = True
    over = (copy[:count] != copy[root][piece]) & mixed[piece]
    volumes = _volumes_by_piece(vertices, faces, piece)
    over ^= (mixed & (np.bincount(piece, np.where(over, -volumes, volumes)) < 0))[piece]
    if mixed.any():
        log.info("%d of %d faces turned over, so that neighbours agree", int(over.sum()), count)
    if np.where(over, -volumes, volumes).sum() < 0:
        log.info("the surface faced inwards and is taken turned over")
        over = ~over
    closed = np.bincount(piece, (edges.count[edges.of_half_edge] != 2).reshape(-1, 3).any(1)) == 0
    inward = np.flatnonzero(closed & (np.bincount(piece, np.where(over, -volumes, volumes)) < 0))
    if len(inward):
        wrong = inward[~_enclosed(vertices, np.where(over[:, None], faces[:, ::-1], faces), piece, inward)]
        over ^= np.isin(piece, wrong)
        if len(wrong):
            log.info("%d parts faced inwards and are taken turned over", len(wrong))
    return over


def _volumes_by_piece(vertices: np.ndarray, faces: np.ndarray, piece: np.ndarray) -> np.ndarray:
    """Signed volumes [F] of the tetrahedra from the mean corner of each face's piece."""
    corners = vertices[faces].astype(np.float64)
    middle = corners.mean(1)
    count = np.bincount(piece)
    middle = np.stack([np.bincount(piece, middle[:, k]) / count for k in range(3)], -1)
    a, b, c = (corners - middle[piece][:, None]).swapaxes(0, 1)
    return np.einsum("ij,ij->i", a, np.cross(b, c)) / 6


def _enclosed(vertices: np.ndarray, faces: np.ndarray, piece: np.ndarray, inward: np.ndarray) -> np.ndarray:
    """Return which of the closed pieces `inward` [P], which face inwards, lie inside the rest [P] bool.

    Looked at right outside the largest face of each, where its own winding number is zero.
    """
    areas = face_areas(vertices, faces)
    order = np.lexsort((areas, piece))
    last = order[np.searchsorted(piece[order], inward, side="right") - 1]  # the largest face of each piece
    a, b, c = vertices[faces[last]].astype(np.float64).swapaxes(0, 1)
    normals = np.cross(b - a, c - a)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    outside = (a + b + c) / 3 - NEAR * normals / np.sqrt(np.maximum(length, 1e-300))  # normals face inwards
    return TriangleTree(vertices[faces].astype(np.float64)).winding_numbers(outside) > 0.5


def one_sided(faces: np.ndarray) -> np.ndarray:
    """Return which faces [F] bool of welded faces to keep so that no part lies there twice, once facing each way.

    Such parts are surfaces that a program wrote for both sides; they would enclose nothing. A wall between two rooms
    is there twice, too, but not the rest of its part.
    """
    _, key = np.unique(np.sort(faces, axis=1), axis=0, return_inverse=True)
    key = key.reshape(-1)
    low = faces.argmin(1)[:, None]
    rolled = np.take_along_axis(faces, (low + np.arange(3)) % 3, axis=1)
    odd = rolled[:, 1] > rolled[:, 2]
    both = (np.bincount(key, odd)[key] > 0) & (np.bincount(key, ~odd)[key] > 0)
    part = face_components(faces, int(faces.max()) + 1)
    double = np.bincount(part, ~both)[part] == 0
    first = np.zeros(len(faces), dtype=bool)
    first[np.unique(key, return_index=True)[1]] = True
    return ~double | first


def creased(mesh: Mesh, crease_deg: float = CREASE_DEG) -> Mesh:
    """Return a copy to be shaded: the same faces in order, facing outwards, smooth across seams, sharp at edges.

    Vertices are welded by position, then given one copy for each group of faces around them that no crease divides, so
    that area-weighted vertex normals are right. It has vertices and faces only.
    """
    positions, faces = welded_faces(mesh)
    over = turned(positions, faces)
    faces = np.where(over[:, None], faces[:, ::-1], faces)
    a, b, c = (positions[faces[:, k]].astype(np.float64) for k in range(3))
    normals = np.cross(b - a, c - a)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    half, _ = adjacent_faces(edges_of(faces))
    smooth = np.einsum("ij,ij->i", *(normals[half[:, k] // 3] for k in (0, 1))) >= np.cos(np.radians(crease_deg))
    half = half[smooth]
    face, k = half // 3, half % 3
    flat = faces.reshape(-1)
    links = []
    for end in (0, 1):  # the corner of the first face at this end of the edge, and the second face's at the same vertex
        here = 3 * face[:, 0] + (k[:, 0] + end) % 3
        near, far = 3 * face[:, 1] + k[:, 1], 3 * face[:, 1] + (k[:, 1] + 1) % 3
        links.append(np.stack([here, np.where(flat[near] == flat[here], near, far)], -1))
    _, group = label_components(len(flat), np.concatenate(links))
    _, first, corner_of = np.unique(group, return_index=True, return_inverse=True)
    source = np.where(over[:, None], mesh.faces[:, ::-1], mesh.faces).reshape(-1)[first]
    return Mesh(mesh.vertices[source], corner_of.reshape(-1, 3).astype(np.int32))


def smooth_normals(mesh: Mesh, crease_deg: float = CREASE_DEG) -> np.ndarray:
    """Return unit normals [V, 3] float32 of a file's own vertices: outwards, smooth across seams, sharp where split."""
    shaded = creased(mesh, crease_deg)
    normals = shaded.vertex_normals().astype(np.float64)[shaded.faces]  # [F, 3, 3] by corner
    normals *= face_areas(mesh.vertices, mesh.faces)[:, None, None]
    over = (shaded.vertices[shaded.faces] != mesh.vertices[mesh.faces]).any((1, 2))
    normals = np.where(over[:, None, None], normals[:, ::-1], normals)
    total = np.zeros((len(mesh.vertices), 3))
    np.add.at(total, mesh.faces.reshape(-1), normals.reshape(-1, 3))
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return np.where(length > 0, total / np.where(length > 0, length, 1), [0.0, 1.0, 0.0]).astype(np.float32)
