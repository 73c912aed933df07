"""A tree of boxes over triangles: nearest points, winding numbers, crossings and occlusion of many points at once.

Winding numbers are those of Jacobson et al. 2013 (eq. 5), with far groups of triangles replaced by one dipole each as
in Barill et al. 2018 (first order): right for surfaces with holes, overlapping parts and triangles that do not meet,
about 1 inside a closed surface that faces outwards, 0 outside, between them near a hole.

Triangles are sorted along a Morton curve and cut into a power of two of leaves; node i has the children 2 i + 1 and
2 i + 2, so the tree is a handful of arrays. Letters: F triangles, N points, M nodes.
"""

from __future__ import annotations

import math

import numpy as np

from stages.kernels.cpu.jit import njit

LEAF = 4  # triangles a leaf, at most
FAR = 3.0  # radii of a node from which its dipole stands for it; closed surfaces were off by at most 0.014
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
LIFT = 1e-4  # of a ray's reach: where it starts above the surface, so that its own triangle does not stop it
STACK = 64  # a path down and its siblings: more than the depth of any tree


class TriangleTree:
    """The tree of triangles [F, 3, 3]; F may be any number from 1."""

    def __init__(self, triangles: np.ndarray) -> None:
        triangles = np.asarray(triangles, np.float64)
        if triangles.ndim != 3 or triangles.shape[1:] != (3, 3) or not len(triangles):
            raise ValueError(f"triangles: wanted shape [F, 3, 3] with F > 0, got {list(triangles.shape)}")
        self.order = _morton_order(triangles.mean(1))  # the given triangle of each one in `triangles`
        self.triangles = np.ascontiguousarray(triangles[self.order])
        leaves = 1 << max(0, math.ceil(math.log2(len(triangles) / LEAF)))
        self.starts = np.arange(leaves + 1) * len(triangles) // leaves  # of each leaf's triangles
        self._sum_up()

    def _sum_up(self) -> None:
        """Boxes [M, 6], area vectors [M, 3] and centres with radii [M, 4] of all nodes, from the leaves up."""
        corners, leaves = self.triangles, len(self.starts) - 1
        first = self.starts[:-1]
        area_vector = 0.5 * np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        area = np.linalg.norm(area_vector, axis=1, keepdims=True)
        low, high = (np.empty((2 * leaves - 1, 3)) for _ in range(2))
        vector, weighted, total = np.empty_like(low), np.empty_like(low), np.empty((2 * leaves - 1, 1))
        low[leaves - 1 :] = np.minimum.reduceat(corners.min(1), first)
        high[leaves - 1 :] = np.maximum.reduceat(corners.max(1), first)
        vector[leaves - 1 :] = np.add.reduceat(area_vector, first)
        weighted[leaves - 1 :] = np.add.reduceat(area * corners.mean(1), first)
        total[leaves - 1 :] = np.add.reduceat(area, first)
        while leaves > 1:
            leaves //= 2
            parents, level = slice(leaves - 1, 2 * leaves - 1), slice(2 * leaves - 1, 4 * leaves - 1)
            low[parents] = np.minimum(low[level][0::2], low[level][1::2])
            high[parents] = np.maximum(high[level][0::2], high[level][1::2])
            for values in (vector, weighted, total):
                values[parents] = values[level][0::2] + values[level][1::2]
        centre = np.where(total > 0, weighted / np.maximum(total, 1e-300), (low + high) / 2)
        radius = np.linalg.norm(np.maximum(high - centre, centre - low), axis=1, keepdims=True)
        self._boxes = np.concatenate([low, high], 1)
        self._vectors, self._balls = vector, np.concatenate([centre, radius], 1)

    def distances(self, points: np.ndarray) -> np.ndarray:
        """Return the distance [N] float64 of points [N, 3] to the nearest triangle, exact."""
        points = np.ascontiguousarray(points, np.float64)
        return np.sqrt(_square_distances(points, self._boxes, self.starts, self.triangles))

    def nearest(self, points: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest place to each point among the triangles that face its way, any where none does.

        Args:
            points: [N, 3].
            directions: [N, 3], of whose half space a triangle's normal must be.
        Returns: triangle [N] int64 as given to the constructor, and barycentric weights [N, 3] float64.
        """
        points, directions = (np.ascontiguousarray(x, np.float64) for x in (points, directions))
        place, weights = _nearest(points, directions, self._boxes, self.starts, self.triangles)
        return self.order[place], weights

    def open_share(self, points: np.ndarray, normals: np.ndarray, reach: float, rays: int = 64) -> np.ndarray:
        """Return the share [N] in [0, 1] of cosine-weighted directions about each normal that nothing stops.

        That is ambient light under a plain sky; 1 minus it is ambient occlusion.

        Args:
            points: [N, 3] on the surface.
            normals: [N, 3] unit, outwards.
            reach: length of a ray; what is further away stops none.
            rays: of each point, in a spiral over the hemisphere, turned by another angle at every point.
        """
        points, normals = (np.ascontiguousarray(x, np.float64) for x in (points, normals))
        k = np.arange(rays) + 0.5
        radius, angle = np.sqrt(k / rays), k * GOLDEN_ANGLE
        spiral = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.sqrt(1 - k / rays)], -1)
        return _open_share(points, normals, spiral, reach, self._boxes, self.starts, self.triangles)

    def hits(self, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count triangles crossed by segments from start [N, 3] to end [N, 3], [N], and return t [N] of the first.

        t runs from 0 at the start to 1 at the end and is 1 where nothing is hit; a shared edge may count twice.
        """
        start, end = (np.ascontiguousarray(x, np.float64) for x in (start, end))
        return _segment_hits(start, end, self._boxes, self.starts, self.triangles)

    def winding_numbers(self, points: np.ndarray) -> np.ndarray:
        """Return generalised winding numbers [N] float64 of points [N, 3]."""
        points = np.ascontiguousarray(points, np.float64)
        return _winding_numbers(points, self._balls, self._vectors, self.starts, self.triangles)


def _morton_order(points: np.ndarray) -> np.ndarray:
    """The order of points [F, 3] along a Morton curve of 21 bits an axis; equal codes keep their order."""
    low, size = points.min(0), np.ptp(points, axis=0).max()
    cells = ((points - low) / max(size, 1e-300) * (2**21 - 1)).astype(np.uint64)
    code = np.zeros(len(points), np.uint64)
    for axis in range(3):
        x = cells[:, axis]
        for shift, mask in (
            (32, 0x1F00000000FFFF), (16, 0x1F0000FF0000FF), (8, 0x100F00F00F00F00F),
            (4, 0x10C30C30C30C30C3), (2, 0x1249249249249249),
        ):  # fmt: skip
            x = (x | (x << np.uint64(shift))) & np.uint64(mask)
        code |= x << np.uint64(axis)
    return np.argsort(code, kind="stable")


@njit(cache=True)
def _box_square(p, box):
    total = 0.0
    for k in range(3):
        d = max(box[k] - p[k], p[k] - box[k + 3], 0.0)
        total += d * d
    return total


@njit(cache=True)
def _closest(p, t):
    """Squared distance of a point to a triangle, and the weights of the second and third corner at the closest point.

    Source: Ericson, Real-Time Collision Detection, sec. 5.1.5.
    """
    abx, aby, abz = t[1, 0] - t[0, 0], t[1, 1] - t[0, 1], t[1, 2] - t[0, 2]
    acx, acy, acz = t[2, 0] - t[0, 0], t[2, 1] - t[0, 1], t[2, 2] - t[0, 2]
    px, py, pz = p[0] - t[0, 0], p[1] - t[0, 1], p[2] - t[0, 2]
    d1, d2 = abx * px + aby * py + abz * pz, acx * px + acy * py + acz * pz
    ab2, ac2 = abx * abx + aby * aby + abz * abz, acx * acx + acy * acy + acz * acz
    abac = abx * acx + aby * acy + abz * acz
    d3, d4, d5, d6 = d1 - ab2, d2 - abac, d1 - abac, d2 - ac2
    va, vb, vc = d3 * d6 - d5 * d4, d5 * d2 - d1 * d6, d1 * d4 - d3 * d2
    v, w = 0.0, 0.0
    if d1 <= 0 and d2 <= 0:
        pass
    elif d3 >= 0 and d4 <= d3:
        v = 1.0
    elif d6 >= 0 and d5 <= d6:
        w = 1.0
    elif vc <= 0 and d1 >= 0 and d3 <= 0:
        v = d1 / (d1 - d3) if d1 != d3 else 0.0
    elif vb <= 0 and d2 >= 0 and d6 <= 0:
        w = d2 / (d2 - d6) if d2 != d6 else 0.0
    elif va <= 0 and d4 >= d3 and d5 >= d6:
        side = (d4 - d3) + (d5 - d6)
        w = (d4 - d3) / side if side > 0 else 0.0
        v = 1.0 - w
    else:
        total = va + vb + vc
        if total > 0:
            v, w = vb / total, vc / total
    x, y, z = px - v * abx - w * acx, py - v * aby - w * acy, pz - v * abz - w * acz
    return x * x + y * y + z * z, v, w


@njit(cache=True, nogil=True)
def _push_children(p, boxes, node, stack, reach, top):
    """Put a node's children on the stack with their squared distances, the nearer one on top; returns its height."""
    left, right = 2 * node + 1, 2 * node + 2
    near, far = _box_square(p, boxes[left]), _box_square(p, boxes[right])
    if near > far:
        left, right, near, far = right, left, far, near
    stack[top], reach[top] = right, far
    stack[top + 1], reach[top + 1] = left, near
    return top + 2


@njit(cache=True, nogil=True)
def _square_distances(points, boxes, starts, triangles):
    out = np.empty(len(points))
    inner = len(starts) - 2  # nodes that are not leaves
    stack = np.empty(STACK, np.int64)
    reach = np.empty(STACK)
    for i in range(len(points)):
        p = points[i]
        best, top = np.inf, 1
        stack[0], reach[0] = 0, _box_square(p, boxes[0])
        while top > 0:
            top -= 1
            node = stack[top]
            if reach[top] >= best:
                continue
            if node >= inner:
                for f in range(starts[node - inner], starts[node - inner + 1]):
                    best = min(best, _closest(p, triangles[f])[0])
                continue
            top = _push_children(p, boxes, node, stack, reach, top)
        out[i] = best
    return out


@njit(cache=True, nogil=True)
def _nearest(points, directions, boxes, starts, triangles):
    place, weights = np.zeros(len(points), np.int64), np.zeros((len(points), 3))
    inner = len(starts) - 2
    stack = np.empty(STACK, np.int64)
    reach = np.empty(STACK)
    for i in range(len(points)):
        p, n = points[i], directions[i]
        best = np.inf
        for attempt in range(2):  # the second time whichever way the triangles face
            if best < np.inf:
                break
            top = 1
            stack[0], reach[0] = 0, _box_square(p, boxes[0])
            while top > 0:
                top -= 1
                node = stack[top]
                if reach[top] >= best:
                    continue
                if node >= inner:
                    for f in range(starts[node - inner], starts[node - inner + 1]):
                        t = triangles[f]
                        ux, uy, uz = t[1, 0] - t[0, 0], t[1, 1] - t[0, 1], t[1, 2] - t[0, 2]
                        vx, vy, vz = t[2, 0] - t[0, 0], t[2, 1] - t[0, 1], t[2, 2] - t[0, 2]
                        facing = n[0] * (uy * vz - uz * vy) + n[1] * (uz * vx - ux * vz) + n[2] * (ux * vy - uy * vx)
                        if facing > 0 or attempt == 1:
                            square, v, w = _closest(p, t)
                            if square < best:
                                best, place[i] = square, f
                                weights[i, 0], weights[i, 1], weights[i, 2] = 1 - v - w, v, w
                    continue
                top = _push_children(p, boxes, node, stack, reach, top)
    return place, weights


@njit(cache=True, nogil=True)
def _open_share(points, normals, spiral, length, boxes, starts, triangles):
    out = np.empty(len(points))
    inner = len(starts) - 2
    stack = np.empty(STACK, np.int64)
    p, d = np.empty(3), np.empty(3)
    for i in range(len(points)):
        n = normals[i]
        sign = math.copysign(1.0, n[2])  # the frame of Duff et al. 2017, turned about n
        a = -1.0 / (sign + n[2])
        b = n[0] * n[1] * a
        c, s = math.cos(i * GOLDEN_ANGLE), math.sin(i * GOLDEN_ANGLE)
        for k in range(3):
            p[k] = points[i, k] + LIFT * length * n[k]
        free = 0
        for r in range(len(spiral)):
            x, y, z = c * spiral[r, 0] - s * spiral[r, 1], s * spiral[r, 0] + c * spiral[r, 1], spiral[r, 2]
            d[0] = length * (x * (1.0 + sign * n[0] * n[0] * a) + y * b + z * n[0])
            d[1] = length * (x * sign * b + y * (sign + n[1] * n[1] * a) + z * n[1])
            d[2] = length * (-x * sign * n[0] - y * n[1] + z * n[2])
            top, stopped = 1, False
            stack[0] = 0
            while top > 0 and not stopped:
                top -= 1
                node = stack[top]
                if not _meets_box(p, d, boxes[node]):
                    continue
                if node >= inner:
                    for f in range(starts[node - inner], starts[node - inner + 1]):
                        stopped = stopped or _segment_t(p, d, triangles[f]) <= 1.0
                else:
                    stack[top], stack[top + 1] = 2 * node + 1, 2 * node + 2
                    top += 2
            free += not stopped
        out[i] = free / len(spiral)
    return out


@njit(cache=True)
def _meets_box(p, d, box):
    """Whether the segment from p to p + d meets a box: the slab test."""
    enter, leave = 0.0, 1.0
    for k in range(3):
        if d[k] == 0.0:
            if p[k] < box[k] or p[k] > box[k + 3]:
                return False
        else:
            t0, t1 = (box[k] - p[k]) / d[k], (box[k + 3] - p[k]) / d[k]
            enter, leave = max(enter, min(t0, t1)), min(leave, max(t0, t1))
    return enter <= leave


@njit(cache=True)
def _segment_t(p, d, t):
    """Return t where p + t d meets a triangle, 2.0 where it does not (Moeller & Trumbore 1997, both sides)."""
    ux, uy, uz = t[1, 0] - t[0, 0], t[1, 1] - t[0, 1], t[1, 2] - t[0, 2]
    vx, vy, vz = t[2, 0] - t[0, 0], t[2, 1] - t[0, 1], t[2, 2] - t[0, 2]
    hx, hy, hz = d[1] * vz - d[2] * vy, d[2] * vx - d[0] * vz, d[0] * vy - d[1] * vx
    det = ux * hx + uy * hy + uz * hz
    if det == 0.0:
        return 2.0
    sx, sy, sz = p[0] - t[0, 0], p[1] - t[0, 1], p[2] - t[0, 2]
    a = (sx * hx + sy * hy + sz * hz) / det
    if a < 0.0 or a > 1.0:
        return 2.0
    qx, qy, qz = sy * uz - sz * uy, sz * ux - sx * uz, sx * uy - sy * ux
    b = (d[0] * qx + d[1] * qy + d[2] * qz) / det
    if b < 0.0 or a + b > 1.0:
        return 2.0
    at = (vx * qx + vy * qy + vz * qz) / det
    return at if 0.0 <= at <= 1.0 else 2.0


@njit(cache=True, nogil=True)
def _segment_hits(start, end, boxes, starts, triangles):
    count, first = np.zeros(len(start), np.int64), np.ones(len(start))
    inner = len(starts) - 2
    stack = np.empty(STACK, np.int64)
    for i in range(len(start)):
        p = start[i]
        d = end[i] - p
        top = 1
        stack[0] = 0
        while top > 0:
            top -= 1
            node = stack[top]
            apart = False
            for k in range(3):  # the segment's own box is small enough to do without a slab test
                apart = apart or min(p[k], end[i, k]) > boxes[node, k + 3] or max(p[k], end[i, k]) < boxes[node, k]
            if apart:
                continue
            if node >= inner:
                for f in range(starts[node - inner], starts[node - inner + 1]):
                    t = _segment_t(p, d, triangles[f])
                    if t <= 1.0:
                        count[i] += 1
                        first[i] = min(first[i], t)
            else:
                stack[top], stack[top + 1] = 2 * node + 1, 2 * node + 2
                top += 2
    return count, first


@njit(cache=True)
def _half_angle(p, t):
    """Half the solid angle of a triangle seen from p, signed (Van Oosterom & Strackee 1983)."""
    ax, ay, az = t[0, 0] - p[0], t[0, 1] - p[1], t[0, 2] - p[2]
    bx, by, bz = t[1, 0] - p[0], t[1, 1] - p[1], t[1, 2] - p[2]
    cx, cy, cz = t[2, 0] - p[0], t[2, 1] - p[1], t[2, 2] - p[2]
    la, lb = math.sqrt(ax * ax + ay * ay + az * az), math.sqrt(bx * bx + by * by + bz * bz)
    lc = math.sqrt(cx * cx + cy * cy + cz * cz)
    top = ax * (by * cz - bz * cy) + ay * (bz * cx - bx * cz) + az * (bx * cy - by * cx)
    ab, bc, ca = ax * bx + ay * by + az * bz, bx * cx + by * cy + bz * cz, cx * ax + cy * ay + cz * az
    return math.atan2(top, la * lb * lc + ab * lc + bc * la + ca * lb)


@njit(cache=True, nogil=True)
def _winding_numbers(points, balls, vectors, starts, triangles):
    out = np.empty(len(points))
    inner = len(starts) - 2
    stack = np.empty(STACK, np.int64)
    for i in range(len(points)):
        p = points[i]
        total, top = 0.0, 1
        stack[0] = 0
        while top > 0:
            top -= 1
            node = stack[top]
            x, y, z = balls[node, 0] - p[0], balls[node, 1] - p[1], balls[node, 2] - p[2]
            square = x * x + y * y + z * z
            if square > (FAR * balls[node, 3]) ** 2:
                n = vectors[node]
                total += (n[0] * x + n[1] * y + n[2] * z) / (square * math.sqrt(square)) / (4 * math.pi)
            elif node >= inner:
                for f in range(starts[node - inner], starts[node - inner + 1]):
                    total += _half_angle(p, triangles[f]) / (2 * math.pi)
            else:
                stack[top], stack[top + 1] = 2 * node + 1, 2 * node + 2
                top += 2
        out[i] = total
    return out
