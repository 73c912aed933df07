"""Our own UV charts: six-way box projection, smoothed, straightened per chart, split until nothing overlaps.

The fallback for xatlas. Each chart is a connected set of faces whose normals lie within 78 degrees of one direction;
it is projected along its mean normal and scaled to its area on the surface. Deterministic: no randomness, ties by
index. Letters: F faces, P pairs of faces that share an edge, C charts.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from stages.mesh.measure import adjacent_faces, edges_of, face_areas, label_components
from stages.mesh.mesh import Mesh
from stages.mesh.texture.pack import pack
from stages.mesh.texture.texels import double_covered

AXES = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=np.float64)
# A face may join a chart whose direction is at most acos(0.2) = 78 degrees from its normal: at most 5 times smaller.
MIN_COS = 0.2
# Weight of the neighbours' labels against the face's own fit when labels are smoothed.
SMOOTHNESS = 1.0
SWEEPS = 20
# A chart below this share of the surface joins a neighbour if its faces allow it.
SMALL_CHART = 2e-3


def _smooth_labels(normals: np.ndarray, pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Axis labels [F]: the best fitting axis, pulled towards the neighbours' (iterated conditional modes)."""
    fit = normals @ AXES.T  # [F, 6]
    flat = np.linalg.norm(normals, axis=1) < 0.5  # degenerate: fits anywhere
    allowed = (fit > MIN_COS + 0.15) | flat[:, None]
    labels = fit.argmax(axis=1)
    total = np.bincount(pairs.reshape(-1), np.repeat(weights, 2), len(normals))
    share = weights / np.maximum(total[pairs], 1e-30).T  # [2, P] of each side's perimeter
    for sweep in range(SWEEPS):
        vote = np.zeros_like(fit)
        for side in (0, 1):
            np.add.at(vote, (pairs[:, side], labels[pairs[:, 1 - side]]), share[side])
        better = np.where(allowed, fit**2 * np.sign(fit) + SMOOTHNESS * vote, -np.inf).argmax(axis=1)
        # Half of the faces at a time, or neighbours could swap labels for ever.
        turn = np.arange(len(labels)) % 2 == sweep % 2
        labels = np.where(turn, better, labels)
    return labels


def _connected(labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Chart index [F]: connected faces of one label."""
    return label_components(len(labels), pairs[labels[pairs[:, 0]] == labels[pairs[:, 1]]])[1]


def _absorb_small(
    labels: np.ndarray, normals: np.ndarray, areas: np.ndarray, pairs: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Give small charts the label of the neighbour with the longest common border that all their faces allow."""
    labels = labels.copy()
    worst = AXES @ normals.T  # [6, F]
    worst[:, np.linalg.norm(normals, axis=1) < 0.5] = 1
    for _ in range(4):
        charts = _connected(labels, pairs)
        size = np.bincount(charts, areas)
        count = len(size)
        fits = np.stack([_minimum_by(charts, worst[axis], count) for axis in range(6)], 1) > MIN_COS  # [C, 6]
        border = np.zeros((count, 6))
        across = charts[pairs[:, 0]] != charts[pairs[:, 1]]
        for side in (0, 1):
            other = labels[pairs[across, 1 - side]]
            np.add.at(border, (charts[pairs[across, side]], other), weights[across])
        border[~fits] = 0
        target = border.argmax(axis=1)
        label_of = np.zeros(count, dtype=labels.dtype)
        label_of[charts] = labels
        # Only local minima of size move, so two small neighbours do not swap places.
        least = np.full(count, np.inf)
        for side in (0, 1):
            np.minimum.at(least, charts[pairs[across, side]], size[charts[pairs[across, 1 - side]]])
        move = (size < SMALL_CHART * areas.sum()) & (border.max(axis=1) > 0) & (size <= least)
        if not move.any():
            break
        labels = np.where(move[charts], target[charts], labels)
    return labels


def _minimum_by(groups: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    result = np.full(count, np.inf)
    np.minimum.at(result, groups, values)
    return result


def _project(
    mesh: Mesh, charts: np.ndarray, axis: np.ndarray, normals: np.ndarray, areas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Corners [F, 3, 2] of every face in its chart's plane, in world units, and the size [C, 2] of every chart.

    Each chart is seen along its mean normal (along its axis where that would turn a face away), scaled to its area on
    the surface, turned to the narrowest box and laid on its longer side with the lower left corner at 0.
    """
    count = int(charts.max()) + 1
    mean = np.stack([np.bincount(charts, areas * normals[:, k], count) for k in range(3)], -1)
    length = np.linalg.norm(mean, axis=1, keepdims=True)  # 0 where all faces are degenerate
    mean /= np.maximum(length, 1e-30)
    flat = np.linalg.norm(normals, axis=1) < 0.5
    cosine = np.where(flat, 1.0, np.einsum("ij,ij->i", normals, mean[charts]))
    own_axis = np.zeros((count, 3))
    own_axis[charts] = AXES[axis]
    usable = (_minimum_by(charts, cosine, count) > MIN_COS) & (length[:, 0] > 0)
    direction = np.where(usable[:, None], mean, own_axis)
    helper = np.eye(3)[np.abs(direction).argmin(axis=1)]
    right = np.cross(helper, direction)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    up = np.cross(direction, right)
    points = mesh.vertices[mesh.faces].astype(np.float64)  # [F, 3, 3]
    flatland = np.stack([np.einsum("fcj,fj->fc", points, b[charts]) for b in (right, up)], -1)
    edge1, edge2 = flatland[:, 1] - flatland[:, 0], flatland[:, 2] - flatland[:, 0]
    covered = np.bincount(charts, np.abs(edge1[:, 0] * edge2[:, 1] - edge1[:, 1] * edge2[:, 0]) / 2, count)
    scale = np.sqrt(np.bincount(charts, areas, count) / np.maximum(covered, 1e-30))
    flatland *= np.where(covered > 0, scale, 1.0)[charts][:, None, None]

    corner_chart = np.repeat(charts, 3)
    order = np.argsort(corner_chart, kind="stable")
    starts = np.searchsorted(corner_chart[order], np.arange(count))
    sorted_points = flatland.reshape(-1, 2)[order]
    best_area, best = np.full(count, np.inf), np.zeros(count)
    for angle in np.arange(18) * (np.pi / 36):
        turned = sorted_points @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).T
        extent = np.maximum.reduceat(turned, starts) - np.minimum.reduceat(turned, starts)
        box = extent.prod(axis=1)
        better = box < best_area * (1 - 1e-9)
        best_area[better], best[better] = box[better], angle
    c, s = np.cos(best)[charts][:, None], np.sin(best)[charts][:, None]
    turned = np.stack([c * flatland[..., 0] - s * flatland[..., 1], s * flatland[..., 0] + c * flatland[..., 1]], -1)
    ordered = turned.reshape(-1, 2)[order]
    extent = np.maximum.reduceat(ordered, starts) - np.minimum.reduceat(ordered, starts)
    tall = (extent[:, 1] > extent[:, 0])[charts][:, None]
    x, y = turned[..., 0], turned[..., 1]
    turned = np.stack([np.where(tall, y, x), np.where(tall, -x, y)], -1)
    ordered = turned.reshape(-1, 2)[order]
    low, high = np.minimum.reduceat(ordered, starts), np.maximum.reduceat(ordered, starts)
    return turned - low[charts][:, None], high - low


def _split(charts: np.ndarray, neighbours: list[list[int]], conflicts: np.ndarray) -> np.ndarray:
    """Split every chart with a conflict in two: each face goes with the nearer of two conflicting faces, in steps."""
    charts = charts.copy()
    following = int(charts.max()) + 1
    halves = set()
    for one, other in conflicts.tolist():
        chart = int(charts[one])
        if chart != charts[other] or chart in halves:
            continue
        halves.update((chart, following))
        side = {one: chart, other: following}
        queue = deque((one, other))
        while queue:
            face = queue.popleft()
            for near in neighbours[face]:
                if near not in side and charts[near] == chart:
                    side[near] = side[face]
                    queue.append(near)
        for face, owner in side.items():
            charts[face] = owner
        following += 1
    return charts


def _conflicts(corners: np.ndarray, charts: np.ndarray, sizes: np.ndarray, suspects: np.ndarray) -> np.ndarray:
    """Pairs of faces [P, 2] among `suspects` that cover the same texel, the charts laid side by side."""
    start = np.concatenate([[0], np.cumsum(np.ceil(sizes[:, 0]) + 2)])[:-1]
    laid = corners[suspects]
    laid[..., 0] += start[charts[suspects]][:, None]
    return suspects[double_covered(laid)[0]]


def unwrap_by_boxes(mesh: Mesh, size: int, padding: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return UV coordinates without overlaps, area distortion bounded by the projection angle.

    Args:
        mesh: any triangle mesh.
        size: texture side in texels.
        padding: least texels between charts.
    Returns: uv [T, 2] float32 in [0, 1], v up; uv_faces [F, 3] int32; the number of charts.
    Raises: ValueError if the charts with their padding do not fit into the texture.
    """
    edges = edges_of(mesh.faces)
    halves, inner = adjacent_faces(edges)
    agree = edges.balance[inner] == 0
    pairs, ends = halves[agree] // 3, edges.pairs[inner[agree]]
    weights = np.linalg.norm(mesh.vertices[ends[:, 0]].astype(np.float64) - mesh.vertices[ends[:, 1]], axis=1)
    normals, areas = mesh.face_normals().astype(np.float64), face_areas(mesh.vertices, mesh.faces)
    labels = _absorb_small(_smooth_labels(normals, pairs, weights), normals, areas, pairs, weights)
    charts = _connected(labels, pairs)

    neighbours: list[list[int]] = [[] for _ in range(len(mesh.faces))]
    for f, g in pairs.tolist():
        neighbours[f].append(g)
        neighbours[g].append(f)
    # Overlaps are sought at `size` texels to a square of the surface's area: finer than the packed texture will be.
    scale = size / np.sqrt(areas.sum())
    suspects = np.arange(len(mesh.faces))
    while True:
        corners, sizes = _project(mesh, charts, labels, normals, areas)
        conflicts = _conflicts(corners * scale, charts, sizes * scale, suspects)
        if len(conflicts) == 0:
            places, texels_per_unit = pack(sizes, size, padding)
            texels = (corners * texels_per_unit + places[charts][:, None]).astype(np.float32)
            conflicts, _ = double_covered(texels)
        if len(conflicts) == 0:
            break
        suspects = np.flatnonzero(np.isin(charts, charts[conflicts]))
        charts = _connected(_split(charts, neighbours, conflicts), pairs)  # at least one more chart, so this ends

    keys = np.stack([np.repeat(charts, 3), mesh.faces.reshape(-1)], -1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    uv = texels.reshape(-1, 2)[first] / np.float32(size)
    return uv, inverse.reshape(-1, 3).astype(np.int32), len(sizes)
