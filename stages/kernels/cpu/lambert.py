"""numba kernels behind stages/kernels/lambert.py, point by point; definition in reference/lambert.py."""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit
from stages.kernels.cpu.threads import each
from stages.kernels.reference.lambert import LIGHT_MIN

CHUNK = 1 << 13  # points a task shades


@njit(cache=True, nogil=True, inline="always")
def _direction(x, y, z, shortest):
    """The vector over its length or over `shortest`, one over that divisor, and 1 if the length is the divisor or 0."""
    zero, one = np.float32(0), np.float32(1)
    length = np.sqrt(x * x + y * y + z * z)
    short = length < shortest  # nan is not, and goes on
    scale = one / (shortest if short else length)
    return x * scale, y * scale, z * scale, scale, zero if short else one


@njit(cache=True, nogil=True, inline="always")
def _incidence(normals, points, light, p, shortest):
    """Direction of the normal and to the light as of _direction, and their cosine, also where it is negative."""
    q = p if len(light) > 1 else 0
    if shortest > np.float32(0):
        n = _direction(normals[p, 0], normals[p, 1], normals[p, 2], shortest)
    else:
        n = (normals[p, 0], normals[p, 1], normals[p, 2], np.float32(1), np.float32(0))
    x, y, z = light[q, 0] - points[p, 0], light[q, 1] - points[p, 1], light[q, 2] - points[p, 2]
    t = _direction(x, y, z, np.float32(LIGHT_MIN))
    return n, t, n[0] * t[0] + n[1] * t[1] + n[2] * t[2]


@njit(cache=True, nogil=True)
def _forward(task, albedo, normals, points, light, ambient, diffuse, shortest, out):
    zero = np.float32(0)
    for p in range(task * CHUNK, min(len(normals), (task + 1) * CHUNK)):
        _, _, cosine = _incidence(normals, points, light, p, shortest)
        factor = ambient + diffuse * (zero if cosine < zero else cosine)
        a = p if len(albedo) > 1 else 0
        for k in range(3):
            out[p, k] = albedo[a, k] * factor


@njit(cache=True, nogil=True)
def _backward(task, albedo, normals, points, light, ambient, diffuse, shortest, grad, g_albedo, g_normals, g_points):
    zero = np.float32(0)
    for p in range(task * CHUNK, min(len(normals), (task + 1) * CHUNK)):
        n, t, cosine = _incidence(normals, points, light, p, shortest)
        a = p if len(albedo) > 1 else 0
        if len(g_albedo) > 0:
            factor = ambient + diffuse * (zero if cosine < zero else cosine)
            for k in range(3):
                g_albedo[p, k] = grad[p, k] * factor
        g = grad[p, 0] * albedo[a, 0] + grad[p, 1] * albedo[a, 1] + grad[p, 2] * albedo[a, 2]
        g = zero if cosine < zero else diffuse * g
        if len(g_normals) > 0:  # of n = v / |v|: (g t - (g t . n) n) / |v|
            along = g * cosine * n[4]
            for k in range(3):
                g_normals[p, k] = (g * t[k] - along * n[k]) * n[3]
        if len(g_points) > 0:
            along = g * cosine * t[4]
            for k in range(3):
                g_points[p, k] = (along * t[k] - g * n[k]) * t[3]


def _numbers(*values: float) -> tuple[np.float32, ...]:
    return tuple(np.float32(value) for value in values)


def lambert_forward(albedo, normals, points, light, ambient, diffuse, shortest, out):
    """Fill out [N, 3]."""
    numbers = _numbers(ambient, diffuse, shortest)
    each(-(-len(normals) // CHUNK), _forward, albedo, normals, points, light, *numbers, out)


def lambert_backward(albedo, normals, points, light, ambient, diffuse, shortest, grad, g_albedo, g_normals, g_points):
    """Fill the gradients [N, 3] in albedo, normals and points; one of no rows is not asked for."""
    numbers = _numbers(ambient, diffuse, shortest)
    tasks = -(-len(normals) // CHUNK)
    each(tasks, _backward, albedo, normals, points, light, *numbers, grad, g_albedo, g_normals, g_points)
