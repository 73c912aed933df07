"""numba kernel behind stages/kernels/smoothness.py: values and gradients in one pass; serial: sums have one order."""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit
from stages.kernels.cpu.normals import add_cross, add_cross_gradient
from stages.kernels.reference.raster import NORMAL_SQUARE_MIN


@njit(cache=True, nogil=True)
def smoothness(vertices, faces, edges, sides, values, grads):
    """Both terms into values [2] float64, their gradients into grads [2, V, 3]; grads [0, V, 3] leaves them out."""
    points, count = vertices.astype(np.float64), len(vertices)
    normals, areas = np.zeros((len(faces), 3)), np.zeros(len(faces))
    sums, umbrella, degree = np.zeros((count, 3)), np.zeros((count, 3)), np.zeros(count)
    for f in range(len(faces)):
        nx, ny, nz = add_cross(points, faces, f, sums)
        square = nx * nx + ny * ny + nz * nz
        if square > NORMAL_SQUARE_MIN:
            area = np.sqrt(square)
            areas[f] = area
            normals[f, 0], normals[f, 1], normals[f, 2] = nx / area, ny / area, nz / area

    length, weight, bent = 0.0, 0.0, 0.0
    for e in range(len(edges)):
        a, b, i, j = edges[e, 0], edges[e, 1], sides[e, 0], sides[e, 1]
        dx, dy, dz = points[b, 0] - points[a, 0], points[b, 1] - points[a, 1], points[b, 2] - points[a, 2]
        length += np.sqrt(dx * dx + dy * dy + dz * dz)
        umbrella[a, 0] += dx
        umbrella[a, 1] += dy
        umbrella[a, 2] += dz
        umbrella[b, 0] -= dx
        umbrella[b, 1] -= dy
        umbrella[b, 2] -= dz
        degree[a] += 1.0
        degree[b] += 1.0
        cosine = normals[i, 0] * normals[j, 0] + normals[i, 1] * normals[j, 1] + normals[i, 2] * normals[j, 2]
        smaller = min(areas[i], areas[j])
        weight += smaller
        bent += smaller * (1.0 - cosine)
    weight = max(weight, 1e-30)
    length = max(length / max(len(edges), 1), 1e-12)

    squares = 0.0
    for v in range(count):  # umbrella becomes the gradient of the term in the sum of the differences
        square = sums[v, 0] ** 2 + sums[v, 1] ** 2 + sums[v, 2] ** 2
        scale = 1.0 / (max(degree[v], 1.0) * length)
        along = 0.0
        if square > NORMAL_SQUARE_MIN:
            size = np.sqrt(square)
            for k in range(3):
                along += umbrella[v, k] * sums[v, k] / size
            along *= scale
            for k in range(3):
                umbrella[v, k] = 2.0 * along * scale / count * sums[v, k] / size
        else:
            for k in range(3):
                umbrella[v, k] = 0.0
        squares += along * along
    values[0] = bent / weight
    values[1] = squares / max(count, 1)
    if len(grads) == 0:
        return

    turned, first, second = np.zeros((len(faces), 3)), np.zeros((count, 3)), np.zeros((count, 3))
    for e in range(len(edges)):
        a, b, i, j = edges[e, 0], edges[e, 1], sides[e, 0], sides[e, 1]
        share = -min(areas[i], areas[j]) / weight
        for k in range(3):
            difference = umbrella[a, k] - umbrella[b, k]
            second[b, k] += difference
            second[a, k] -= difference
            turned[i, k] += share * normals[j, k]
            turned[j, k] += share * normals[i, k]
    for f in range(len(faces)):
        if areas[f] == 0.0:
            continue
        nx, ny, nz = normals[f, 0], normals[f, 1], normals[f, 2]
        gx, gy, gz = turned[f, 0], turned[f, 1], turned[f, 2]
        along = nx * gx + ny * gy + nz * gz
        gx, gy, gz = (gx - along * nx) / areas[f], (gy - along * ny) / areas[f], (gz - along * nz) / areas[f]
        add_cross_gradient(points, faces, f, gx, gy, gz, first)
    for v in range(count):
        for k in range(3):
            grads[0, v, k] = first[v, k]
            grads[1, v, k] = second[v, k]
