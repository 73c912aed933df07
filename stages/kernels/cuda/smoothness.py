"""Warp kernels behind stages/kernels/smoothness.py; sums over neighbours by sums.collect: repeatable bytes."""

from __future__ import annotations

import torch
import warp as wp
from torch import Tensor

from stages.kernels.cuda import sums as cuda_sums
from stages.kernels.cuda.launch import launch
from stages.kernels.cuda.normals import normals_forward
from stages.kernels.reference.raster import NORMAL_SQUARE_MIN

wp.set_module_options({"enable_backward": False, "fuse_fp": False})

f64 = wp.float64
SQUARE_MIN = wp.constant(wp.float64(NORMAL_SQUARE_MIN))


@wp.func
def _add(peak: wp.array(dtype=wp.float32), total: wp.array(dtype=wp.int64), unit: f64, row: int, term: wp.vec3d):
    for k in range(3):
        cuda_sums.add(peak, total, unit, 3 * row + k, term[k])


@wp.kernel(grid_stride=False)
def _faces(
    points: wp.array(dtype=wp.vec3d),
    faces: wp.array2d(dtype=wp.int32),
    normals: wp.array(dtype=wp.vec3d),
    areas: wp.array(dtype=wp.float64),
):
    f = wp.tid()
    a = points[faces[f, 0]]
    cross = wp.cross(points[faces[f, 1]] - a, points[faces[f, 2]] - a)
    square = wp.dot(cross, cross)
    area, normal = f64(0.0), wp.vec3d()
    if square > SQUARE_MIN:
        area = wp.sqrt(square)
        normal = cross / area
    areas[f] = area
    normals[f] = normal


@wp.kernel(grid_stride=False)
def _edges(
    points: wp.array(dtype=wp.vec3d),
    edges: wp.array2d(dtype=wp.int32),
    sides: wp.array2d(dtype=wp.int32),
    normals: wp.array(dtype=wp.vec3d),
    areas: wp.array(dtype=wp.float64),
    edge_terms: wp.array(dtype=wp.vec3d),
):
    """Length, weight and weighted bend of each edge."""
    e = wp.tid()
    i, j = sides[e, 0], sides[e, 1]
    weight = wp.min(areas[i], areas[j])
    bend = f64(1.0) - wp.dot(normals[i], normals[j])
    edge_terms[e] = wp.vec3d(wp.length(points[edges[e, 1]] - points[edges[e, 0]]), weight, weight * bend)


@wp.kernel(grid_stride=False)
def _differences(
    edges: wp.array2d(dtype=wp.int32),
    values: wp.array(dtype=wp.vec3d),
    peak: wp.array(dtype=wp.float32),
    total: wp.array(dtype=wp.int64),
    unit: wp.float64,
):
    """Each vertex's sum of what its neighbours have more than itself; its own adjoint, so it is the way back too."""
    e = wp.tid()
    step = values[edges[e, 1]] - values[edges[e, 0]]
    _add(peak, total, unit, edges[e, 0], step)
    _add(peak, total, unit, edges[e, 1], -step)


@wp.kernel(grid_stride=False)
def _turn(
    sides: wp.array2d(dtype=wp.int32),
    normals: wp.array(dtype=wp.vec3d),
    edge_terms: wp.array(dtype=wp.vec3d),
    peak: wp.array(dtype=wp.float32),
    total: wp.array(dtype=wp.int64),
    unit: wp.float64,
):
    """Minus the weighted normals across each face's edges: the gradient in its own, but for the weights' sum."""
    e = wp.tid()
    i, j = sides[e, 0], sides[e, 1]
    _add(peak, total, unit, i, -edge_terms[e][1] * normals[j])
    _add(peak, total, unit, j, -edge_terms[e][1] * normals[i])


@wp.kernel(grid_stride=False)
def _corners(
    points: wp.array(dtype=wp.vec3d),
    faces: wp.array2d(dtype=wp.int32),
    slopes: wp.array(dtype=wp.vec3d),
    peak: wp.array(dtype=wp.float32),
    total: wp.array(dtype=wp.int64),
    unit: wp.float64,
):
    """From the gradient in every face's cross product to that in its corners."""
    f = wp.tid()
    a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
    at_b = wp.cross(points[c] - points[a], slopes[f])
    at_c = wp.cross(slopes[f], points[b] - points[a])
    _add(peak, total, unit, b, at_b)
    _add(peak, total, unit, c, at_c)
    _add(peak, total, unit, a, -(at_b + at_c))


def smoothness(vertices: Tensor, faces: Tensor, edges: Tensor, sides: Tensor, values: Tensor, grads: Tensor) -> None:
    """Both terms into values [2] float64, their gradients into grads [2, V, 3]; grads [0, V, 3] leaves them out."""
    device, count, points = vertices.device, len(vertices), vertices.double()
    normals = torch.zeros(len(faces), 3, dtype=torch.float64, device=device)
    areas = torch.zeros(len(faces), dtype=torch.float64, device=device)
    edge_terms = torch.zeros(len(edges), 3, dtype=torch.float64, device=device)
    launch(_faces, len(faces), (points, faces, normals, areas))
    launch(_edges, len(edges), (points, edges, sides, normals, areas, edge_terms))
    length, weight, bend_sum = edge_terms.sum(0)
    length, weight = (length / max(len(edges), 1)).clamp_min(1e-12), weight.clamp_min(1e-30)
    ends = edges.reshape(-1)
    degree = torch.zeros(count, dtype=torch.int64, device=device).index_add_(0, ends, torch.ones_like(ends).long())
    degree = degree.clamp_min(1)
    terms = 2 * max(len(edges), len(faces), 1)

    def vertex_sums(kernel, dim: int, rows: int, *arguments: Tensor) -> Tensor:
        def run(peak: Tensor, total: Tensor, unit: float) -> None:
            launch(kernel, dim, (*arguments, peak, total, unit))

        return cuda_sums.collect((rows, 3), terms, device, run)

    umbrella = vertex_sums(_differences, len(edges), count, edges, points)
    upwards = torch.empty_like(vertices, memory_format=torch.contiguous_format)
    sizes = torch.empty(count, dtype=torch.float64, device=device)
    normals_forward(vertices, faces, upwards, sizes)
    upwards = upwards.double() * (sizes > 0)[:, None]
    scale = 1 / (degree * length)
    along = (umbrella * upwards).sum(1) * scale
    values[0], values[1] = bend_sum / weight, along.square().sum() / max(count, 1)
    if len(grads) == 0:
        return
    slopes = (2 / max(count, 1) * along * scale)[:, None] * upwards
    grads[1] = vertex_sums(_differences, len(edges), count, edges, slopes)
    turns = vertex_sums(_turn, len(edges), len(faces), sides, normals, edge_terms) / weight
    flat = turns - (turns * normals).sum(1, keepdim=True) * normals
    slopes = torch.where(areas[:, None] > 0, flat / areas[:, None].clamp_min(1e-300), 0.0).contiguous()
    grads[0] = vertex_sums(_corners, len(faces), count, points, faces, slopes)
