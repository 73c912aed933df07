"""numba kernels behind vertex_normals of stages/kernels/raster.py; serial, so the sums have one order.

Their loops' bodies, a triangle's cross product and its gradient, are also those of cpu/smoothness.py.
"""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit
from stages.kernels.reference.raster import NORMAL_SQUARE_MIN


@njit
def spanning_edges(vertices, triangles, f):
    """Return the edges u and v of triangle f from its first corner to the others, in float64."""
    a, b, c = triangles[f, 0], triangles[f, 1], triangles[f, 2]
    ax, ay, az = np.float64(vertices[a, 0]), np.float64(vertices[a, 1]), np.float64(vertices[a, 2])
    ux, uy, uz = vertices[b, 0] - ax, vertices[b, 1] - ay, vertices[b, 2] - az
    vx, vy, vz = vertices[c, 0] - ax, vertices[c, 1] - ay, vertices[c, 2] - az
    return ux, uy, uz, vx, vy, vz


@njit
def add_cross(vertices, triangles, f, total):
    """Return the cross product u x v of triangle f, and add it to its corners' sums [V, 3]."""
    ux, uy, uz, vx, vy, vz = spanning_edges(vertices, triangles, f)
    nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    for i in (triangles[f, 0], triangles[f, 1], triangles[f, 2]):
        total[i, 0] += nx
        total[i, 1] += ny
        total[i, 2] += nz
    return nx, ny, nz


@njit
def add_cross_gradient(vertices, triangles, f, gx, gy, gz, out):
    """Turn the gradient in triangle f's cross product into that in its corners, added to out [V, 3]."""
    a, b, c = triangles[f, 0], triangles[f, 1], triangles[f, 2]
    ux, uy, uz, vx, vy, vz = spanning_edges(vertices, triangles, f)
    bx, by, bz = vy * gz - vz * gy, vz * gx - vx * gz, vx * gy - vy * gx
    cx, cy, cz = gy * uz - gz * uy, gz * ux - gx * uz, gx * uy - gy * ux
    out[b, 0] += bx
    out[b, 1] += by
    out[b, 2] += bz
    out[c, 0] += cx
    out[c, 1] += cy
    out[c, 2] += cz
    out[a, 0] -= bx + cx
    out[a, 1] -= by + cy
    out[a, 2] -= bz + cz


@njit(cache=True, nogil=True)
def normals_forward(vertices, triangles, out, length):
    """Fill unit normals [V, 3] and the lengths [V] of the area-weighted sums; length 0 and +y where there is none."""
    total = np.zeros((len(vertices), 3), np.float64)
    for f in range(len(triangles)):
        add_cross(vertices, triangles, f, total)
    for i in range(len(vertices)):
        square = total[i, 0] ** 2 + total[i, 1] ** 2 + total[i, 2] ** 2
        if square > NORMAL_SQUARE_MIN:
            length[i] = np.sqrt(square)
            for k in range(3):
                out[i, k] = total[i, k] / length[i]
        else:
            length[i], out[i, 0], out[i, 1], out[i, 2] = 0.0, 0.0, 1.0, 0.0


@njit(cache=True, nogil=True)
def normals_backward(vertices, triangles, normals, length, grad, out):
    """Gradient of vertices [V, 3], added to out (float64)."""
    total = np.zeros((len(vertices), 3), np.float64)
    for i in range(len(vertices)):
        if length[i] > 0.0:
            dot = 0.0
            for k in range(3):
                dot += np.float64(normals[i, k]) * grad[i, k]
            for k in range(3):
                total[i, k] = (grad[i, k] - dot * normals[i, k]) / length[i]
    for f in range(len(triangles)):
        a, b, c = triangles[f, 0], triangles[f, 1], triangles[f, 2]
        gx = total[a, 0] + total[b, 0] + total[c, 0]
        gy = total[a, 1] + total[b, 1] + total[c, 1]
        gz = total[a, 2] + total[b, 2] + total[c, 2]
        add_cross_gradient(vertices, triangles, f, gx, gy, gz, out)
