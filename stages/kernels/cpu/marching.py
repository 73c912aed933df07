"""numba kernels behind stages/kernels/marching.py; definitions in reference/marching.py.

Two passes over flags and prefix sums, so that vertices and faces come out in the order of their edges and tetrahedra.
Serial on purpose: at 350,000 tetrahedra a pass takes about a millisecond, below which one thread wins.
"""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit
from stages.kernels.reference.marching import TRIANGLES

_TABLE = np.array(TRIANGLES, dtype=np.int8)


@njit(cache=True, nogil=True)
def _march(positions, sdf, edges, tets, tet_edges, guard, table):
    n, n_edges, n_tets = sdf.shape[0], edges.shape[0], tets.shape[0]
    inside = np.empty(n, np.uint8)
    for i in range(n):
        inside[i] = 1 if sdf[i] < 0 else 0
    count = 0
    for e in range(n_edges):
        count += inside[edges[e, 0]] ^ inside[edges[e, 1]]
    number = np.empty(n_edges, np.int32)
    crossing = np.empty(count, np.int32)
    vertices = np.empty((count, 3), np.float32)
    one = np.float32(1)
    v = 0
    for e in range(n_edges):
        a, b = edges[e, 0], edges[e, 1]
        if inside[a] != inside[b]:
            from_a, from_b = abs(sdf[a]) + guard, abs(sdf[b]) + guard
            t = from_a / (from_a + from_b)
            for k in range(3):
                vertices[v, k] = positions[a, k] * (one - t) + positions[b, k] * t
            crossing[v] = e
            number[e] = v
            v += 1
    code = np.empty(n_tets, np.uint8)
    count = 0
    for i in range(n_tets):
        c = inside[tets[i, 0]] | inside[tets[i, 1]] << 1 | inside[tets[i, 2]] << 2 | inside[tets[i, 3]] << 3
        code[i] = c
        count += 0 if c == 0 or c == 15 else 1 if table[c, 3] < 0 else 2
    faces = np.empty((count, 3), np.int32)
    f = 0
    for i in range(n_tets):
        c = code[i]
        if c == 0 or c == 15:
            continue
        for corner in range(0, 6, 3):
            if table[c, corner] < 0:
                break
            for k in range(3):
                faces[f, k] = number[tet_edges[i, table[c, corner + k]]]
            f += 1
    return vertices, faces, crossing


@njit(cache=True, nogil=True)
def _crossing_backward(positions, sdf, edges, crossing, guard, grad, grad_positions, grad_sdf):
    one = np.float32(1)
    for v in range(crossing.shape[0]):
        a, b = edges[crossing[v], 0], edges[crossing[v], 1]
        from_a, from_b = abs(sdf[a]) + guard, abs(sdf[b]) + guard
        scale = one / (from_a + from_b)
        t = from_a * scale
        along = np.float32(0)
        for k in range(3):
            g = grad[v, k]
            along += g * (positions[b, k] - positions[a, k])
            grad_positions[a, k] += g * (one - t)
            grad_positions[b, k] += g * t
        along *= scale
        grad_sdf[a] += along * (one - t) * (-one if sdf[a] < 0 else one)
        grad_sdf[b] -= along * t * (-one if sdf[b] < 0 else one)


@njit(cache=True, nogil=True)
def _mesh_edges(faces, n):
    """Half edges bucketed by their lower vertex, each bucket sorted by the higher one; ok is False if not closed."""
    n_faces = faces.shape[0]
    start = np.zeros(n + 1, np.int64)
    for f in range(n_faces):
        for k in range(3):
            start[min(faces[f, k], faces[f, (k + 1) % 3]) + 1] += 1
    for i in range(n):
        start[i + 1] += start[i]
    fill = start[:-1].copy()
    high = np.empty(3 * n_faces, np.int64)  # 2 * higher vertex + (1 if the half edge runs downwards)
    side = np.empty(3 * n_faces, np.int32)
    for f in range(n_faces):
        for k in range(3):
            a, b = np.int64(faces[f, k]), np.int64(faces[f, (k + 1) % 3])
            low, key = (a, 2 * b) if a < b else (b, 2 * a + 1)
            slot = fill[low]
            while slot > start[low] and high[slot - 1] > key:
                high[slot], side[slot] = high[slot - 1], side[slot - 1]
                slot -= 1
            high[slot], side[slot] = key, f
            fill[low] += 1
    n_edges = 3 * n_faces // 2
    edges = np.empty((n_edges, 2), np.int32)
    sides = np.empty((n_edges, 2), np.int32)
    if 3 * n_faces % 2:
        return edges, sides, False
    e = 0
    for i in range(n):
        if (start[i + 1] - start[i]) % 2:
            return edges, sides, False
        for slot in range(start[i], start[i + 1], 2):
            forward, backward = high[slot], high[slot + 1]
            repeated = slot + 2 < start[i + 1] and high[slot + 2] >> 1 == forward >> 1
            if forward & 1 or backward != forward + 1 or repeated:
                return edges, sides, False
            edges[e, 0], edges[e, 1] = i, forward >> 1
            sides[e, 0], sides[e, 1] = side[slot], side[slot + 1]
            e += 1
    return edges, sides, True


def march(positions, sdf, edges, tets, tet_edges, guard: float):
    """Return vertices, faces and edges, all numpy: from float32 [N, 3], [N]; int32 [E, 2], [T, 4], [T, 6]."""
    return _march(positions, sdf, edges, tets, tet_edges, np.float32(guard), _TABLE)


def crossing_backward(positions, sdf, edges, crossing, guard: float, grad):
    """Return gradients (positions [N, 3], sdf [N]) of the crossing points from grad [V, 3], summed in vertex order."""
    grad_positions, grad_sdf = np.zeros_like(positions), np.zeros_like(sdf)
    _crossing_backward(positions, sdf, edges, crossing, np.float32(guard), grad, grad_positions, grad_sdf)
    return grad_positions, grad_sdf


def mesh_edges(faces, vertices: int):
    """Return edges and sides of faces int32 [F, 3]; None where the surface is not closed and oriented."""
    edges, sides, closed = _mesh_edges(faces, vertices)
    return (edges, sides) if closed else None
