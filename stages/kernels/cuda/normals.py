"""Vertex normals in Warp, one thread a vertex; as cpu/normals.py, without atomics.

A vertex adds up its own triangles: the corners of all triangles, stably sorted by vertex, name them in the order in
which the CPU's loop meets them, and the float64 sums have the same bytes.
"""

from __future__ import annotations

import torch
import warp as wp
from torch import Tensor

from stages.kernels.cuda.launch import launch
from stages.kernels.reference.raster import NORMAL_SQUARE_MIN

wp.set_module_options({"enable_backward": False, "fuse_fp": False})

SQUARE_MIN = wp.constant(wp.float64(NORMAL_SQUARE_MIN))
UP = wp.constant(wp.vec3d(0.0, 1.0, 0.0))


@wp.func
def _vertex(vertices: wp.array2d(dtype=wp.float32), i: int) -> wp.vec3d:
    return wp.vec3d(wp.float64(vertices[i, 0]), wp.float64(vertices[i, 1]), wp.float64(vertices[i, 2]))


@wp.kernel(grid_stride=False)
def _forward(
    vertices: wp.array2d(dtype=wp.float32),
    triangles: wp.array2d(dtype=wp.int32),
    corners: wp.array(dtype=wp.int64),
    first: wp.array(dtype=wp.int64),
    normals: wp.array2d(dtype=wp.float32),
    length: wp.array(dtype=wp.float64),
):
    """Corners first[v] .. first[v + 1] of the sorted corners 3 f + k are those of vertex v."""
    v = wp.tid()
    total = wp.vec3d()
    for at in range(int(first[v]), int(first[v + 1])):
        f = int(corners[at] / wp.int64(3))
        a = _vertex(vertices, triangles[f, 0])
        total += wp.cross(_vertex(vertices, triangles[f, 1]) - a, _vertex(vertices, triangles[f, 2]) - a)
    square = wp.dot(total, total)
    unit, size = UP, wp.float64(0.0)
    if square > SQUARE_MIN:
        size = wp.sqrt(square)
        unit = total / size
    length[v] = size
    for k in range(3):
        normals[v, k] = wp.float32(unit[k])


@wp.func
def _sum_gradient(
    normals: wp.array2d(dtype=wp.float32),
    length: wp.array(dtype=wp.float64),
    grad: wp.array2d(dtype=wp.float32),
    v: int,
) -> wp.vec3d:
    """Gradient in a vertex's sum of cross products."""
    result = wp.vec3d()
    if length[v] > wp.float64(0.0):
        n, g = _vertex(normals, v), _vertex(grad, v)
        result = (g - wp.dot(n, g) * n) / length[v]
    return result


@wp.kernel(grid_stride=False)
def _backward(
    vertices: wp.array2d(dtype=wp.float32),
    triangles: wp.array2d(dtype=wp.int32),
    corners: wp.array(dtype=wp.int64),
    first: wp.array(dtype=wp.int64),
    normals: wp.array2d(dtype=wp.float32),
    length: wp.array(dtype=wp.float64),
    grad: wp.array2d(dtype=wp.float32),
    out: wp.array2d(dtype=wp.float64),
):
    v = wp.tid()
    total = wp.vec3d()
    for at in range(int(first[v]), int(first[v + 1])):
        f, corner = int(corners[at] / wp.int64(3)), int(corners[at] % wp.int64(3))
        i, j, k = triangles[f, 0], triangles[f, 1], triangles[f, 2]
        a = _vertex(vertices, i)
        g = _sum_gradient(normals, length, grad, i) + _sum_gradient(normals, length, grad, j)
        g = g + _sum_gradient(normals, length, grad, k)
        at_b = wp.cross(_vertex(vertices, k) - a, g)
        at_c = wp.cross(g, _vertex(vertices, j) - a)
        if corner == 0:
            total -= at_b + at_c
        elif corner == 1:
            total += at_b
        else:
            total += at_c
    for k in range(3):
        out[v, k] = out[v, k] + total[k]


def incidence(triangles: Tensor, vertices: int) -> tuple[Tensor, Tensor]:
    """Return corners 3 f + k in order of their vertex, [3 F] int64, and where each vertex's begin, [V + 1] int64."""
    owners, corners = torch.sort(triangles.reshape(-1), stable=True)
    numbers = torch.arange(vertices + 1, dtype=owners.dtype, device=owners.device)
    return corners, torch.searchsorted(owners, numbers)


def normals_forward(vertices: Tensor, triangles: Tensor, out: Tensor, length: Tensor) -> None:
    """Fill unit normals [V, 3] and the lengths [V] (float64) of the area-weighted sums; 0 and +y for none."""
    corners, first = incidence(triangles, len(vertices))
    launch(_forward, len(vertices), (vertices, triangles, corners, first, out, length))


def normals_backward(
    vertices: Tensor, triangles: Tensor, normals: Tensor, length: Tensor, grad: Tensor, out: Tensor
) -> None:
    """Gradient of vertices [V, 3], added to out (float64)."""
    corners, first = incidence(triangles, len(vertices))
    launch(_backward, len(vertices), (vertices, triangles, corners, first, normals, length, grad, out))
