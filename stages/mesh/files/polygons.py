"""Polygons of files as triangles: convex ones as fans, concave ones by their ears."""

from __future__ import annotations

import logging

import numpy as np

log = logging.getLogger(__name__)

BENT = 1e-9  # of a polygon's area: a corner is concave where it turns back by more


@np.errstate(all="ignore")  # positions that are not finite are refused with the mesh, by all readers alike
def triangles_of(points: np.ndarray, corners: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the triangles of polygons and the polygon that each comes from, polygon after polygon.

    Args:
        points: [V, 3] positions.
        corners: [C] vertices of all polygons, one polygon after the other.
        sizes: [P] corners of each, at least 3.
    Returns: triangles [T, 3] as places in `corners`, and polygons [T].
    """
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    triangles, owners, concave = [], [], 0
    for size in np.unique(sizes):
        group = np.flatnonzero(sizes == size)
        places = starts[group][:, None] + np.arange(size)  # [P', size]
        fan = np.stack([np.zeros(size - 2, np.int64), np.arange(1, size - 1), np.arange(2, size)], -1)
        bent = np.zeros(len(group), dtype=bool)
        if size > 3:
            flat = _flattened(points[corners[places]].astype(np.float64))
            bent = _concave(flat)
            for k in np.flatnonzero(bent):
                cut = places[k][np.array(ears(flat[k]))]
                triangles.append(cut)
                owners.append(np.full(len(cut), group[k]))
            concave += int(bent.sum())
        triangles.append(places[~bent][:, fan].reshape(-1, 3))
        owners.append(np.repeat(group[~bent], size - 2))
    if concave:
        log.info("%d concave polygons cut into triangles", concave)
    if not triangles:
        return np.zeros((0, 3), np.int64), np.zeros(0, np.int64)
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    return np.concatenate(triangles)[order], owner[order]


def ears(polygon: np.ndarray) -> list[tuple[int, int, int]]:
    """Return the triangles of a simple counter-clockwise polygon [N, 2] as corners, by ear clipping (Meisters 1975).

    What is left of one that crosses itself, when no ear can be found, becomes a fan.
    """
    rest, triangles = list(range(len(polygon))), []
    while len(rest) > 3:
        ring = polygon[rest]
        before, after = np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0)
        turn = _cross(ring - before, after - ring)
        for k in np.argsort(-turn):  # the widest first: slivers come last
            if turn[k] <= 0:
                return triangles + [(rest[0], rest[i], rest[i + 1]) for i in range(1, len(rest) - 1)]
            a, b, c = before[k], ring[k], after[k]
            inside = (_cross(b - a, ring - a) >= 0) & (_cross(c - b, ring - b) >= 0) & (_cross(a - c, ring - c) >= 0)
            corner = (ring == a).all(1) | (ring == b).all(1) | (ring == c).all(1)
            if not (inside & ~corner).any():
                break
        else:
            return triangles + [(rest[0], rest[i], rest[i + 1]) for i in range(1, len(rest) - 1)]
        triangles.append((rest[k - 1], rest[k], rest[(k + 1) % len(rest)]))
        del rest[k]
    return [*triangles, tuple(rest)]


def _flattened(corners: np.ndarray) -> np.ndarray:
    """Polygons [P, N, 3] in their own planes [P, N, 2], counter-clockwise (Newell's normals)."""
    corners = corners - corners.mean(1, keepdims=True)
    normal = np.cross(corners, np.roll(corners, -1, axis=1)).sum(1)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    normal = np.where(length > 0, normal / np.where(length > 0, length, 1), [0, 0, 1.0])
    across = np.cross(normal, np.eye(3)[np.abs(normal).argmin(1)])
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    axes = np.stack([across, np.cross(normal, across)], -1)
    return corners @ axes


def _concave(flat: np.ndarray) -> np.ndarray:
    """Return which polygons [P, N, 2] have a corner that turns back."""
    edge = np.roll(flat, -1, axis=1) - flat
    turn = _cross(np.roll(edge, 1, axis=1), edge)
    area = _cross(flat, np.roll(flat, -1, axis=1)).sum(1, keepdims=True) / 2
    return (turn < -BENT * area).any(1)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def strips(vertices: np.ndarray, restart: int | None = None) -> np.ndarray:
    """Return the triangles [T, 3] of a strip of vertices [N], every second one turned; those without area are dropped.

    Args:
        restart: a vertex that begins a new strip, or None.
    """
    cuts = [] if restart is None else np.flatnonzero(vertices == restart)
    pieces = []
    for part in np.split(vertices, cuts):
        part = part if restart is None else part[part != restart]
        strip = np.stack([part[:-2], part[1:-1], part[2:]], -1) if len(part) > 2 else np.zeros((0, 3), vertices.dtype)
        strip[1::2] = strip[1::2, [1, 0, 2]]
        pieces.append(strip)
    triangles = np.concatenate(pieces)
    return triangles[(triangles != np.roll(triangles, 1, axis=1)).all(1)]
