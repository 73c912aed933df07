"""The texels that a UV layout covers: scan conversion in texture space, exact on shared edges.

Letters: a texel (row, column) has its centre at (column + 0.5, row + 0.5) in layout coordinates, x right and y up (row
0 is the bottom one here). Corners are [F, 3, 2] in texels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CHUNK = 1_000_000  # texels in flight: about 100 MB


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For items repeated `counts` times each: the item index and the position among its repeats."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _chunks(sizes: np.ndarray) -> Iterator[slice]:
    """Consecutive slices whose sizes add up to about CHUNK."""
    total = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = total[start - 1] if start else 0
        stop = max(int(np.searchsorted(total, before + CHUNK, side="right")), start + 1)
        yield slice(start, stop)
        start = stop


def _spans(corners: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last column whose centre lies in each triangle [N, 3, 2] on the row [N] through it."""
    y = rows + 0.5
    crossings = np.full((len(rows), 3), np.nan)
    for k in range(3):
        p, q = corners[:, k], corners[:, (k + 1) % 3]
        # Endpoints in a fixed order, so both faces of an edge compute the same crossing to the last bit.
        swap = (p[:, 1] > q[:, 1]) | ((p[:, 1] == q[:, 1]) & (p[:, 0] > q[:, 0]))
        low, high = np.where(swap[:, None], q, p), np.where(swap[:, None], p, q)
        hit = (low[:, 1] <= y) & (y < high[:, 1])
        rise = np.where(hit, high[:, 1] - low[:, 1], 1.0)
        crossings[:, k] = np.where(hit, low[:, 0] + (y - low[:, 1]) / rise * (high[:, 0] - low[:, 0]), np.nan)
    left, right = np.nanmin(crossings, axis=1), np.nanmax(crossings, axis=1)
    return np.ceil(left - 0.5).astype(np.int64), np.ceil(right - 0.5).astype(np.int64)


def scan(corners: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """List the texels whose centres lie in each triangle; a centre on a shared edge belongs to exactly one of the two.

    Args:
        corners: [F, 3, 2] float64 in texels.
    Yields: face, row, column of each covered texel, int64 [N], in face order, about a million at a time.
    """
    corners = np.asarray(corners, dtype=np.float64)
    first = np.ceil(corners[:, :, 1].min(axis=1) - 0.5).astype(np.int64)
    height = np.ceil(corners[:, :, 1].max(axis=1) - 0.5).astype(np.int64) - first
    width = np.ceil(np.ptp(corners[:, :, 0], axis=1)) + 1
    for part in _chunks(height * np.maximum(width, 1)):
        owner, offset = _expand(height[part])
        face = owner + part.start
        row = first[face] + offset
        left, right = _spans(corners[face], row)
        span, step = _expand(right - left)
        if len(span):
            yield face[span], row[span], left[span] + step


def barycentrics(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return barycentric weights [N, 3] of points [N, 2] in triangles [N, 3, 2], clamped to the triangle."""
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]

    def area(p, q, r):
        return (q[:, 0] - p[:, 0]) * (r[:, 1] - p[:, 1]) - (q[:, 1] - p[:, 1]) * (r[:, 0] - p[:, 0])

    total = area(a, b, c)
    sign = np.where(total < 0, -1.0, 1.0)
    weights = np.stack([area(points, b, c), area(points, c, a), area(points, a, b)], -1) * sign[:, None]
    weights = np.maximum(weights, 0)
    weights[weights.sum(axis=1) <= 0] = 1
    return weights / weights.sum(axis=1, keepdims=True)


def near_borders(
    corners: np.ndarray, half_edges: np.ndarray, reach: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Return the texels whose centres lie within `reach` texels of border half edges.

    Args:
        corners: [F, 3, 2] in texels.
        half_edges: [E] as 3 face + k, from corner k to k + 1.
    Yields: index into half_edges, row, column [N]; t [N] along the half edge of the closest point; distance [N].
    """
    face, k = half_edges // 3, half_edges % 3
    start, end = corners[face, k], corners[face, (k + 1) % 3]
    pieces = np.maximum(np.ceil(np.abs(end - start).max(axis=1) / 8), 1).astype(np.int64)  # keep boxes small
    edge, step = _expand(pieces)
    p = start[edge] + (end - start)[edge] * (step / pieces[edge])[:, None]
    q = start[edge] + (end - start)[edge] * ((step + 1) / pieces[edge])[:, None]
    low = np.ceil(np.minimum(p, q) - reach - 0.5).astype(np.int64)
    size = np.floor(np.maximum(p, q) + reach - 0.5).astype(np.int64) - low + 1
    counts = np.maximum(size, 0).prod(axis=1)
    for part in _chunks(counts):
        piece, offset = _expand(counts[part])
        piece = piece + part.start
        column = low[piece, 0] + offset % size[piece, 0]
        row = low[piece, 1] + offset // size[piece, 0]
        e = edge[piece]
        along = end[e] - start[e]
        centre = np.stack([column, row], -1) + 0.5
        length = np.maximum((along**2).sum(axis=1), 1e-30)
        t = np.clip(((centre - start[e]) * along).sum(axis=1) / length, 0, 1)
        distance = np.linalg.norm(start[e] + t[:, None] * along - centre, axis=1)
        close = distance <= reach
        if close.any():
            yield e[close], row[close], column[close], t[close], distance[close]


def double_covered(corners: np.ndarray) -> tuple[np.ndarray, int]:
    """Return pairs of faces [P, 2] that cover the same texel centre, one a texel, and how many texels are covered."""
    faces, keys = [], []
    low = np.floor(corners.reshape(-1, 2).min(axis=0)).astype(np.int64) - 1
    stride = int(np.ceil(corners[..., 0].max())) - int(low[0]) + 2
    for face, row, column in scan(corners):
        faces.append(face)
        keys.append((row - low[1]) * stride + column - low[0])
    if not faces:
        return np.zeros((0, 2), dtype=np.int64), 0
    face, key = np.concatenate(faces), np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    face, key = face[order], key[order]
    same = np.flatnonzero(key[1:] == key[:-1])
    return np.stack([face[same], face[same + 1]], -1), len(key) - len(same)
