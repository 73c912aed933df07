"""Whether points are inside meshes of closed parts: the signed number of surfaces above them.

Exact for closed, outward parts, which may overlap: a point in k of them has winding number k (Jacobson et al. 2013 sum
solid angles of all triangles instead, which holes do not spoil and which costs more). One pass over the triangles, each
asking the points in the cells of a grid over x and y that its shadow touches.
"""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit

CELLS = 64  # a side of the grid


def winding(triangles: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the winding numbers [N] int of points [N, 3] in triangles [F, 3, 3] of closed parts."""
    low = triangles[..., :2].min((0, 1))
    scale = CELLS / np.maximum(triangles[..., :2].max((0, 1)) - low, 1e-9)
    cell = np.clip((points[:, :2] - low) * scale, 0, CELLS - 1).astype(np.int64)
    number = cell[:, 0] * CELLS + cell[:, 1]
    order = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[order], np.arange(CELLS * CELLS + 1))
    out = np.zeros(len(points), np.int64)
    _crossings(triangles, np.ascontiguousarray(points[order], dtype=np.float64), starts, low, scale, out)
    result = np.empty_like(out)
    result[order] = out
    return result


@njit(cache=True, nogil=True)
def _crossings(triangles, points, starts, low, scale, out):
    for f in range(len(triangles)):
        ax, ay, az = triangles[f, 0]
        bx, by, bz = triangles[f, 1]
        cx, cy, cz = triangles[f, 2]
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area == 0:
            continue
        sign = 1 if area > 0 else -1
        i0 = max(0, min(CELLS - 1, int((min(ax, bx, cx) - low[0]) * scale[0])))
        i1 = max(0, min(CELLS - 1, int((max(ax, bx, cx) - low[0]) * scale[0])))
        j0 = max(0, min(CELLS - 1, int((min(ay, by, cy) - low[1]) * scale[1])))
        j1 = max(0, min(CELLS - 1, int((max(ay, by, cy) - low[1]) * scale[1])))
        for i in range(i0, i1 + 1):
            for p in range(starts[i * CELLS + j0], starts[i * CELLS + j1 + 1]):
                x, y, z = points[p]
                u = ((bx - x) * (cy - y) - (by - y) * (cx - x)) / area
                v = ((cx - x) * (ay - y) - (cy - y) * (ax - x)) / area
                w = 1 - u - v
                if u >= 0 and v >= 0 and w >= 0 and u * az + v * bz + w * cz > z:
                    out[p] += sign
