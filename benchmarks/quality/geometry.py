"""Geometry of a mesh against its ground truth, and the facts of a mesh that no picture shows.

Distances are between points spread evenly over the OUTER surfaces: of overlapping closed parts, and ground truths
are such, what lies inside another part is no surface. Lengths are in units of the truth's bounding-box diagonal.
Letters: N, M points; F faces; K query points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from stages.mesh.mesh import Mesh

POINTS = 8_000  # whose distances are measured
DENSE = 6  # times as many stand for the surface they are measured to; two samplings of one surface are 0.2 % apart
F_THRESHOLD = 0.02  # of the diagonal
GRID = 48  # cells a side of the box both solids are compared in
YAWS = 24  # starting angles of the alignment
_GENERIC = Rotation.from_euler("xyz", [0.3217, 0.5391, 0.7853]).as_matrix()  # no face of a made thing is parallel


def winding_numbers(mesh: Mesh, points: np.ndarray) -> np.ndarray:
    """How many times the surface encloses each point [K], signed: crossings of a ray, out minus in.

    The ray's direction is generic, so that it meets no edge of an axis-aligned mesh; exact for closed meshes.
    """
    if len(mesh.faces) == 0 or len(points) == 0:
        return np.zeros(len(points), np.int32)
    corners = (mesh.vertices.astype(np.float64) @ _GENERIC.T)[mesh.faces]  # [F, 3, 3]
    queries = points.astype(np.float64) @ _GENERIC.T
    bins = max(1, min(256, int(math.sqrt(len(points) / 4))))
    low, high = queries[:, :2].min(0), queries[:, :2].max(0)
    cell = np.maximum((high - low) / bins, 1e-12)
    place = np.minimum(((queries[:, :2] - low) / cell).astype(np.int64), bins - 1)
    flat = place[:, 0] * bins + place[:, 1]
    order = np.argsort(flat, kind="stable")
    starts = np.searchsorted(flat[order], np.arange(bins * bins + 1))
    return _winding(corners, queries, order, starts, low, cell, bins)


@njit(cache=True)
def _winding(corners, queries, order, starts, low, cell, bins):
    out = np.zeros(len(queries), np.int32)
    for f in range(len(corners)):
        a, b, c = corners[f, 0], corners[f, 1], corners[f, 2]
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        if area == 0.0:
            continue
        sign = 1 if area > 0 else -1
        x0 = max(0, math.floor((min(a[0], b[0], c[0]) - low[0]) / cell[0]))
        x1 = min(bins - 1, math.floor((max(a[0], b[0], c[0]) - low[0]) / cell[0]))
        y0 = max(0, math.floor((min(a[1], b[1], c[1]) - low[1]) / cell[1]))
        y1 = min(bins - 1, math.floor((max(a[1], b[1], c[1]) - low[1]) / cell[1]))
        for x in range(x0, x1 + 1):
            for y in range(y0, y1 + 1):
                for i in range(starts[x * bins + y], starts[x * bins + y + 1]):
                    p = queries[order[i]]
                    u = ((b[0] - p[0]) * (c[1] - p[1]) - (b[1] - p[1]) * (c[0] - p[0])) / area
                    v = ((c[0] - p[0]) * (a[1] - p[1]) - (c[1] - p[1]) * (a[0] - p[0])) / area
                    w = 1.0 - u - v
                    if u >= 0 and v >= 0 and w >= 0 and u * a[2] + v * b[2] + w * c[2] > p[2]:
                        out[order[i]] += sign
    return out


def volume_iou(a: Mesh, b: Mesh, grid: int = GRID) -> float:
    """Intersection over union of two solids on grid^3 points of their common bounding box; nan if both are empty."""
    corners = np.concatenate([m.vertices for m in (a, b) if len(m.faces)] or [np.zeros((1, 3))])
    low, high = corners.min(0), corners.max(0)
    axes = [low[k] + (high[k] - low[k]) * (np.arange(grid) + 0.5) / grid for k in range(3)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    inside = [winding_numbers(m, points) > 0 for m in (a, b)]
    union = int((inside[0] | inside[1]).sum())
    return float((inside[0] & inside[1]).sum() / union) if union else math.nan


def surface_points(mesh: Mesh, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 3] evenly over the outer surface, with their face normals [N, 3].

    Returns: about `count` points: those of 2 x `count` that are not inside the solid, thinned; none of an empty mesh.
    """
    a, b, c = (mesh.vertices[mesh.faces[:, k]].astype(np.float64) for k in range(3))
    cross = np.cross(b - a, c - a)
    area = np.linalg.norm(cross, axis=1)
    if area.sum() <= 0:
        return np.zeros((0, 3)), np.zeros((0, 3))
    # stratified along the cumulated area: far more even than independent draws
    face = np.searchsorted(np.cumsum(area) / area.sum(), (np.arange(2 * count) + rng.random(2 * count)) / (2 * count))
    face = np.minimum(face, len(area) - 1)
    r, s = np.sqrt(rng.random(2 * count))[:, None], rng.random(2 * count)[:, None]
    points = (1 - r) * a[face] + r * (1 - s) * b[face] + r * s * c[face]
    normals = cross[face] / area[face, None]
    size = np.linalg.norm(np.ptp(mesh.vertices, axis=0))
    outer = np.flatnonzero(winding_numbers(mesh, points + 1e-4 * size * normals) <= 0)
    outer = rng.permutation(outer)[:count]
    return points[outer], normals[outer]


@dataclass(frozen=True)
class Alignment:
    """x -> scale R_y(yaw) x + shift, y up."""

    yaw_deg: float = 0.0
    scale: float = 1.0
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def rotate(self, vectors: np.ndarray) -> np.ndarray:
        return vectors @ _yaw(math.radians(self.yaw_deg)).T

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return self.scale * self.rotate(points) + np.asarray(self.shift)


def align(points: np.ndarray, target: np.ndarray, steps: int = 30) -> Alignment:
    """The turn about the vertical axis, scale and shift that lay `points` [N, 3] best on `target` [M, 3].

    Iterated closest points (Besl & McKay 1992) with matches in both directions, so that the scale cannot collapse;
    from YAWS starting angles on a tenth of the points, then from the best three on all.
    """
    centre, other = points.mean(0), target.mean(0)
    scale = math.sqrt(((target - other) ** 2).sum(1).mean() / max(((points - centre) ** 2).sum(1).mean(), 1e-20))
    few, fewer = points[:: max(1, len(points) // 800)], target[:: max(1, len(target) // 800)]
    found = []
    for k in range(YAWS):
        start = _similarity(2 * math.pi * k / YAWS, scale, centre, other)
        found.append(_icp(few, fewer, start, 6))
    found.sort(key=lambda pair: pair[0])
    best = min((_icp(points, target, start, steps) for _, start in found[:3]), key=lambda pair: pair[0])
    return best[1]


def _yaw(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _similarity(angle: float, scale: float, centre: np.ndarray, other: np.ndarray) -> Alignment:
    shift = other - scale * _yaw(angle) @ centre
    return Alignment(math.degrees(angle), scale, tuple(shift.tolist()))


def _icp(points: np.ndarray, target: np.ndarray, start: Alignment, steps: int) -> tuple[float, Alignment]:
    """(Chamfer distance, alignment) after at most `steps` rounds of matching and solving."""
    tree, now, best = cKDTree(target), start, (math.inf, start)
    for _ in range(steps):
        moved = now(points)
        there, to = tree.query(moved)
        back, fro = cKDTree(moved).query(target)
        error = 0.5 * (there.mean() + back.mean())
        if error < best[0]:
            improved = error < best[0] * (1 - 1e-4)
            best = (error, now)
            if not improved:
                break
        else:
            break
        p, q = np.concatenate([points, points[fro]]), np.concatenate([target[to], target])
        weight = np.concatenate([np.full(len(points), 1 / len(points)), np.full(len(target), 1 / len(target))])[:, None]
        centre, other = (weight * p).sum(0) / 2, (weight * q).sum(0) / 2
        x, y = p - centre, q - other
        cross = (weight[:, 0] * (x[:, 2] * y[:, 0] - x[:, 0] * y[:, 2])).sum()
        dot = (weight[:, 0] * (x[:, 0] * y[:, 0] + x[:, 2] * y[:, 2])).sum()
        angle = math.atan2(cross, dot)
        turned = x @ _yaw(angle).T
        scale = float((weight * turned * y).sum() / max((weight * x * x).sum(), 1e-20))
        now = _similarity(angle, max(scale, 1e-6), centre, other)
    return best


def compare(mesh: Mesh, truth: Mesh, *, aligned: bool = True, points: int = POINTS, seed: int = 0) -> dict[str, float]:
    """Geometry metrics of a mesh against its ground truth.

    Returns, lengths over the truth's diagonal:
        chamfer: mean of the two mean nearest distances. normal_consistency: mean |cos| between nearest points'
        normals, both ways. f_score: harmonic mean of the shares of points within F_THRESHOLD of the other surface.
        volume_iou. yaw_deg, scale: the alignment's. An empty mesh gives chamfer inf and zeros.
    """
    rng = np.random.default_rng(seed)
    (p, n), (q, m) = surface_points(mesh, DENSE * points, rng), surface_points(truth, DENSE * points, rng)
    diagonal = float(np.linalg.norm(np.ptp(truth.vertices, axis=0)))
    if len(p) == 0:
        return {
            "chamfer": math.inf,
            "normal_consistency": 0.0,
            "f_score": 0.0,
            "volume_iou": 0.0,
            "yaw_deg": 0.0,
            "scale": 1.0,
        }
    move = align(p[: points // 2], q[: points // 2]) if aligned else Alignment()
    p, n = move(p), move.rotate(n)
    there, to = cKDTree(q).query(p[:points])
    back, fro = cKDTree(p).query(q[:points])
    precision, recall = (there <= F_THRESHOLD * diagonal).mean(), (back <= F_THRESHOLD * diagonal).mean()
    cosine = 0.5 * (np.abs((n[:points] * m[to]).sum(1)).mean() + np.abs((m[:points] * n[fro]).sum(1)).mean())
    moved = Mesh(move(mesh.vertices).astype(np.float32), mesh.faces)
    return {
        "chamfer": float(0.5 * (there.mean() + back.mean()) / diagonal),
        "normal_consistency": float(cosine),
        "f_score": float(2 * precision * recall / max(precision + recall, 1e-12)),
        "volume_iou": volume_iou(moved, truth),
        "yaw_deg": (move.yaw_deg + 180) % 360 - 180,
        "scale": move.scale,
    }


def self_intersections(mesh: Mesh) -> int:
    """Pairs of faces without a common corner of which an edge of one passes through the inside of the other."""
    corners = mesh.vertices.astype(np.float64)[mesh.faces] @ _GENERIC.T
    if len(corners) == 0:
        return 0
    _, place = np.unique(mesh.vertices, axis=0, return_inverse=True)  # seams are no gaps
    order = np.argsort(corners[:, :, 0].min(1), kind="stable")
    return int(_crossing_pairs(corners[order], place.reshape(-1)[mesh.faces][order]))


@njit(cache=True)
def _crossing_pairs(corners, faces):
    count = 0
    n = len(corners)
    low, high = np.empty((n, 3)), np.empty((n, 3))
    for f in range(n):
        for k in range(3):
            low[f, k] = min(corners[f, 0, k], corners[f, 1, k], corners[f, 2, k])
            high[f, k] = max(corners[f, 0, k], corners[f, 1, k], corners[f, 2, k])
    for f in range(n):
        for g in range(f + 1, n):
            if low[g, 0] > high[f, 0]:
                break
            if low[g, 1] > high[f, 1] or low[f, 1] > high[g, 1] or low[g, 2] > high[f, 2] or low[f, 2] > high[g, 2]:
                continue
            shared = False
            for i in range(3):
                for j in range(3):
                    shared = shared or faces[f, i] == faces[g, j]
            if shared:
                continue
            for k in range(3):
                if _pierces(corners[f, k], corners[f, (k + 1) % 3], corners[g]) or _pierces(
                    corners[g, k], corners[g, (k + 1) % 3], corners[f]
                ):
                    count += 1
                    break
    return count


@njit(cache=True)
def _volume(a, b, c, d):
    x0, x1, x2 = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    y0, y1, y2 = c[0] - a[0], c[1] - a[1], c[2] - a[2]
    z0, z1, z2 = d[0] - a[0], d[1] - a[1], d[2] - a[2]
    return x0 * (y1 * z2 - y2 * z1) - x1 * (y0 * z2 - y2 * z0) + x2 * (y0 * z1 - y1 * z0)


@njit(cache=True)
def _pierces(p, q, triangle):
    a, b, c = triangle[0], triangle[1], triangle[2]
    if _volume(p, a, b, c) * _volume(q, a, b, c) >= 0:
        return False
    u, v, w = _volume(p, q, a, b), _volume(p, q, b, c), _volume(p, q, c, a)
    return (u > 0 and v > 0 and w > 0) or (u < 0 and v < 0 and w < 0)


def uv_stretch(mesh: Mesh) -> float:
    """L2 texture stretch (Sander et al. 2001, sec. 3): root mean square length of texture steps on the surface.

    Normalised by the total areas: 1 is a map that is isometric up to one scale. Faces without an area in the texture
    are left to `uv_collapsed`. nan without UVs, and where every face has collapsed.
    """
    if mesh.uv is None or len(mesh.faces) == 0:
        return math.nan
    q1, q2, q3, t1, t2, t3, surface, area = _charts(mesh)
    good = np.abs(area) > 1e-14
    if not good.any():
        return math.nan
    q1, q2, q3, t1, t2, t3 = (x[good] for x in (q1, q2, q3, t1, t2, t3))
    double = 2 * area[good, None]
    along_s = (q1 * (t2 - t3)[:, 1:] + q2 * (t3 - t1)[:, 1:] + q3 * (t1 - t2)[:, 1:]) / double
    along_t = (q1 * (t3 - t2)[:, :1] + q2 * (t1 - t3)[:, :1] + q3 * (t2 - t1)[:, :1]) / double
    square = ((along_s**2).sum(1) + (along_t**2).sum(1)) / 2
    total = surface[good].sum()
    return float(math.sqrt((square * surface[good]).sum() / total) * math.sqrt(np.abs(area[good]).sum() / total))


def uv_collapsed(mesh: Mesh) -> float:
    """The share of the surface whose faces have no area in the texture: one texel is stretched over each of them.

    nan without UVs.
    """
    if mesh.uv is None or len(mesh.faces) == 0:
        return math.nan
    *_, surface, area = _charts(mesh)
    return float(surface[np.abs(area) <= 1e-14].sum() / surface.sum())


def _charts(mesh: Mesh) -> tuple[np.ndarray, ...]:
    """The faces' corners in space [F, 3] and in the texture [F, 2], three of each, and their areas [F] there; those in
    the texture are negative where a face is turned over."""
    q1, q2, q3 = (mesh.vertices[mesh.faces[:, k]].astype(np.float64) for k in range(3))
    t1, t2, t3 = (mesh.uv[mesh.uv_faces[:, k]].astype(np.float64) for k in range(3))
    area = ((t2 - t1)[:, 0] * (t3 - t1)[:, 1] - (t2 - t1)[:, 1] * (t3 - t1)[:, 0]) / 2
    surface = np.linalg.norm(np.cross(q2 - q1, q3 - q1), axis=1) / 2
    return q1, q2, q3, t1, t2, t3, surface, area
