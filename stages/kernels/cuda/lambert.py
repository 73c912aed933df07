"""Lambertian shading in Warp, one thread a point; as cpu/lambert.py."""

from __future__ import annotations

import warp as wp
from torch import Tensor

from stages.kernels.cuda.launch import launch
from stages.kernels.reference.lambert import LIGHT_MIN

wp.set_module_options({"enable_backward": False, "fuse_fp": False})

NEAREST = wp.constant(wp.float32(LIGHT_MIN))


@wp.struct
class Direction:
    """A vector over its length or over the shortest that counts, one over that divisor, and 1 if it is the length."""

    vector: wp.vec3
    scale: float
    unclamped: float


@wp.func
def _direction(v: wp.vec3, shortest: float) -> Direction:
    length = wp.sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2])
    d = Direction()
    d.unclamped = 1.0
    if length < shortest:  # nan is not, and goes on
        length = shortest
        d.unclamped = 0.0
    d.scale = 1.0 / length
    d.vector = v * d.scale
    return d


@wp.func
def _normal(normals: wp.array(dtype=wp.vec3), p: int, shortest: float) -> Direction:
    d = Direction()
    d.vector = normals[p]
    d.scale = 1.0
    d.unclamped = 0.0
    if shortest > 0.0:
        d = _direction(normals[p], shortest)
    return d


@wp.func
def _to_light(points: wp.array(dtype=wp.vec3), light: wp.array(dtype=wp.vec3), p: int) -> Direction:
    return _direction(light[wp.min(p, light.shape[0] - 1)] - points[p], NEAREST)


@wp.func
def _cosine(n: Direction, t: Direction) -> float:
    """Also where it is negative."""
    return n.vector[0] * t.vector[0] + n.vector[1] * t.vector[1] + n.vector[2] * t.vector[2]


@wp.kernel(grid_stride=False)
def _forward(
    albedo: wp.array(dtype=wp.vec3), normals: wp.array(dtype=wp.vec3), points: wp.array(dtype=wp.vec3),
    light: wp.array(dtype=wp.vec3), ambient: float, diffuse: float, shortest: float, out: wp.array(dtype=wp.vec3),
):  # fmt: skip
    p = wp.tid()
    cosine = _cosine(_normal(normals, p, shortest), _to_light(points, light, p))
    if cosine < 0.0:
        cosine = 0.0
    out[p] = albedo[wp.min(p, albedo.shape[0] - 1)] * (ambient + diffuse * cosine)


@wp.kernel(grid_stride=False)
def _backward(
    albedo: wp.array(dtype=wp.vec3), normals: wp.array(dtype=wp.vec3), points: wp.array(dtype=wp.vec3),
    light: wp.array(dtype=wp.vec3), ambient: float, diffuse: float, shortest: float, grad: wp.array(dtype=wp.vec3),
    g_albedo: wp.array(dtype=wp.vec3), g_normals: wp.array(dtype=wp.vec3), g_points: wp.array(dtype=wp.vec3),
):  # fmt: skip
    p = wp.tid()
    n, t = _normal(normals, p, shortest), _to_light(points, light, p)
    cosine = _cosine(n, t)
    clamped_cosine = cosine
    g = diffuse * wp.dot(grad[p], albedo[wp.min(p, albedo.shape[0] - 1)])
    if cosine < 0.0:
        clamped_cosine = 0.0
        g = 0.0
    if g_albedo.shape[0] > 0:
        g_albedo[p] = grad[p] * (ambient + diffuse * clamped_cosine)
    if g_normals.shape[0] > 0:  # of n = v / |v|: (g t - (g t . n) n) / |v|
        g_normals[p] = (t.vector * g - n.vector * (g * cosine * n.unclamped)) * n.scale
    if g_points.shape[0] > 0:
        g_points[p] = (t.vector * (g * cosine * t.unclamped) - n.vector * g) * t.scale


def lambert_forward(
    albedo: Tensor, normals: Tensor, points: Tensor, light: Tensor, ambient: float, diffuse: float, shortest: float,
    out: Tensor,
) -> None:  # fmt: skip
    """Fill out [N, 3]."""
    launch(_forward, len(normals), (albedo, normals, points, light, ambient, diffuse, shortest, out))


def lambert_backward(
    albedo: Tensor, normals: Tensor, points: Tensor, light: Tensor, ambient: float, diffuse: float, shortest: float,
    grad: Tensor, g_albedo: Tensor, g_normals: Tensor, g_points: Tensor,
) -> None:  # fmt: skip
    """Fill the gradients [N, 3] in albedo, normals and points; one of no rows is not asked for."""
    numbers = (ambient, diffuse, shortest)
    launch(_backward, len(normals), (albedo, normals, points, light, *numbers, grad, g_albedo, g_normals, g_points))
