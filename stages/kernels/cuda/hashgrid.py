"""Hash-grid ops in Warp, F = 2 features a level; definitions in reference/hashgrid.py, functions as in cpu/hashgrid.py.

Levels are the outer dimension of the grid of threads, so the threads that run together read one level, which stays in
the L2 cache; a row is one 8-byte read. Features are stored feature by feature, a tensor [N, W] with strides (1, N): the
32 threads of a warp write 32 neighbours, and cuda/mlp.py reads them like that. Other strides are read as they are.

The table's gradient is summed in 64-bit fixed point, because whole numbers add up to the same bytes in any order and
float atomics do not: runs on CUDA repeat exactly, as on the CPU. The step of the sum is a power of two, 2^-61 of a
bound on what N points can add to one row; for 2^18 points that is 2^-43 of their largest upstream gradient, and a
row keeps float32's 24 bits down to 2^-19 of it. Where something is not finite the whole gradient is nan.

Compiled without fused multiply-adds: x * resolution - floor(...) would move features at the finest levels by 4e-4.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import warp as wp
from torch import Tensor

from stages.kernels.cuda.launch import launch

wp.set_module_options({"enable_backward": False, "fuse_fp": False})

PRIME_Y = wp.constant(wp.uint32(2654435761))
PRIME_Z = wp.constant(wp.uint32(805459861))
NAN = wp.constant(wp.float32(math.nan))
EXPONENT_MAX = wp.constant(wp.float64(126.0))  # of a float32 whose inverse is one too
Rows = wp.types.vector(length=8, dtype=wp.uint32)


@wp.func
def _axis(value: float, resolution: int):
    """Cell index and fraction of one coordinate, clamped into [0, 1]; of nan, those of 0."""
    scaled = wp.where(value > 0.0, wp.where(value < 1.0, value, 1.0), 0.0) * float(resolution)
    index = wp.min(int(scaled), resolution - 1)
    return index, scaled - float(index)


@wp.func
def _locate(points: wp.array2d(dtype=wp.float32), p: int, level: wp.vec3i, mask: wp.uint32):
    """Rows of the eight corners around a point at one level, x fastest, then y; and the fraction within the cell.

    The fraction of a point that is not finite is nan along all axes, so that what is made of it is nan.
    """
    point = wp.vec3(points[p, 0], points[p, 1], points[p, 2])
    ix, fx = _axis(point[0], level[0])
    iy, fy = _axis(point[1], level[0])
    iz, fz = _axis(point[2], level[0])
    f = wp.vec3(fx, fy, fz)
    if not wp.isfinite(point):
        f = wp.vec3(NAN, NAN, NAN)
    x0, y0, z0 = wp.uint32(ix), wp.uint32(iy), wp.uint32(iz)
    x1 = x0 + wp.uint32(1)
    rows = Rows()
    if level[2] != 0:
        side = wp.uint32(level[0] + 1)
        a = y0 * side + z0 * side * side
        b = a + side
        c = a + side * side
        d = c + side
        rows = Rows(a + x0, a + x1, b + x0, b + x1, c + x0, c + x1, d + x0, d + x1)
    else:
        y, z = y0 * PRIME_Y, z0 * PRIME_Z
        a = y ^ z
        b = (y + PRIME_Y) ^ z
        c = y ^ (z + PRIME_Z)
        d = (y + PRIME_Y) ^ (z + PRIME_Z)
        rows = Rows(
            (x0 ^ a) & mask, (x1 ^ a) & mask, (x0 ^ b) & mask, (x1 ^ b) & mask,
            (x0 ^ c) & mask, (x1 ^ c) & mask, (x0 ^ d) & mask, (x1 ^ d) & mask,
        )  # fmt: skip
    return rows + Rows(wp.uint32(level[1])), f


@wp.func
def _fetch(table: wp.array(dtype=wp.int64), row: wp.uint32) -> wp.vec2:
    """The two features of a row by one read."""
    both = table[int(row)]
    return wp.vec2(wp.cast(wp.int32(both), wp.float32), wp.cast(wp.int32(both >> wp.int64(32)), wp.float32))


@wp.func
def _inside(points: wp.array2d(dtype=wp.float32), p: int, axis: int, value: float) -> float:
    """`value` where the clamped coordinate moves with the point, else 0 (nan where it is not finite)."""
    x = points[p, axis]
    return wp.where(x < 0.0 or x > 1.0, 0.0 * value + 0.0, value)


@wp.func
def _direction(points: wp.array2d(dtype=wp.float32), up: wp.array2d(dtype=wp.float32), p: int, scale: float):
    """Upstream gradient of one point in cell units, zero along clamped axes."""
    x = _inside(points, p, 0, up[p, 0] * scale)
    y = _inside(points, p, 1, up[p, 1] * scale)
    return wp.vec3(x, y, _inside(points, p, 2, up[p, 2] * scale))


@wp.func
def _slopes(f: wp.vec3, u: wp.vec3):
    """Derivative along u of the weights in the plane of y and z, corners 00, 10, 01, 11."""
    gy, gz = 1.0 - f[1], 1.0 - f[2]
    return wp.vec4(
        -u[1] * gz - u[2] * gy, u[1] * gz - u[2] * f[1], -u[1] * f[2] + u[2] * gy, u[1] * f[2] + u[2] * f[1]
    )  # fmt: skip


@wp.func
def _weights(f: wp.vec3):
    """Weights in the plane of y and z, corners 00, 10, 01, 11."""
    gy, gz = 1.0 - f[1], 1.0 - f[2]
    return wp.vec4(gy * gz, f[1] * gz, gy * f[2], f[1] * f[2])


@wp.kernel(grid_stride=False)
def _encode(
    points: wp.array2d(dtype=wp.float32),
    table: wp.array(dtype=wp.int64),
    levels: wp.array(dtype=wp.vec3i),
    mask: wp.uint32,
    out: wp.array2d(dtype=wp.float32),
):
    level, p = wp.tid()
    rows, f = _locate(points, p, levels[level], mask)
    w = _weights(f)
    low, high = wp.vec2(), wp.vec2()
    for k in range(4):
        low += w[k] * _fetch(table, rows[2 * k])
        high += w[k] * _fetch(table, rows[2 * k + 1])
    value = (1.0 - f[0]) * low + f[0] * high
    out[p, 2 * level] = value[0]
    out[p, 2 * level + 1] = value[1]


@wp.kernel(grid_stride=False)
def _gradient(
    points: wp.array2d(dtype=wp.float32),
    table: wp.array(dtype=wp.int64),
    levels: wp.array(dtype=wp.vec3i),
    mask: wp.uint32,
    g_all: wp.array2d(dtype=wp.float32),
    out: wp.array2d(dtype=wp.float32),
):
    """One thread a point: the levels are summed in order, without atomics."""
    p = wp.tid()
    total = wp.vec3()
    for level in range(levels.shape[0]):
        rows, f = _locate(points, p, levels[level], mask)
        g = wp.vec2(g_all[p, 2 * level], g_all[p, 2 * level + 1])
        gx, gy, gz = 1.0 - f[0], 1.0 - f[1], 1.0 - f[2]
        w = _weights(f)
        across = float(0.0)  # derivative by x
        along = wp.vec4()  # values at the corners 00, 10, 01, 11 of the plane of y and z
        for k in range(4):
            low, high = wp.dot(_fetch(table, rows[2 * k]), g), wp.dot(_fetch(table, rows[2 * k + 1]), g)
            across += w[k] * (high - low)
            along[k] = gx * low + f[0] * high
        dy = gz * (along[1] - along[0]) + f[2] * (along[3] - along[2])
        dz = gy * (along[2] - along[0]) + f[1] * (along[3] - along[1])
        total += float(levels[level][0]) * wp.vec3(across, dy, dz)
    for axis in range(3):
        out[p, axis] = _inside(points, p, axis, total[axis])


@wp.kernel(grid_stride=False)
def _directional(
    points: wp.array2d(dtype=wp.float32),
    table: wp.array(dtype=wp.int64),
    levels: wp.array(dtype=wp.vec3i),
    mask: wp.uint32,
    up: wp.array2d(dtype=wp.float32),
    out: wp.array2d(dtype=wp.float32),
):
    level, p = wp.tid()
    rows, f = _locate(points, p, levels[level], mask)
    u = _direction(points, up, p, float(levels[level][0]))
    w, s = _weights(f), _slopes(f, u)
    value = wp.vec2()
    for k in range(4):
        value += ((1.0 - f[0]) * s[k] - u[0] * w[k]) * _fetch(table, rows[2 * k])
        value += (f[0] * s[k] + u[0] * w[k]) * _fetch(table, rows[2 * k + 1])
    out[p, 2 * level] = value[0]
    out[p, 2 * level + 1] = value[1]


@wp.kernel(grid_stride=False)
def _scale(
    e_max: wp.array(dtype=wp.float32),
    g_max: wp.array(dtype=wp.float32),
    up_max: wp.array(dtype=wp.float32),
    finest: int,
    spare: int,
    state: wp.array(dtype=wp.float32),
):
    """state = steps per unit, units per step (a power of two and its inverse), and whether something is not finite.

    The weights of a point's corners sum to 1 and the magnitudes of their slopes to 2 |u|_1 <= 6 finest max |up|.
    """
    bound = wp.float64(e_max[0]) + wp.float64(6 * finest) * wp.float64(g_max[0]) * wp.float64(up_max[0])
    exponent = wp.float64(0.0)
    if not wp.isfinite(bound):
        state[2] = 1.0
    elif bound > wp.float64(0.0):
        exponent = wp.clamp(wp.float64(spare) - wp.ceil(wp.log2(bound)), -EXPONENT_MAX, EXPONENT_MAX)
    state[0] = wp.float32(wp.pow(wp.float64(2.0), exponent))
    state[1] = wp.float32(wp.pow(wp.float64(2.0), -exponent))


@wp.func
def _add(total: wp.array2d(dtype=wp.int64), row: wp.uint32, value: wp.vec2, steps: float):
    """Add to a row in fixed point; a float32 times a power of two is exact."""
    a, b = wp.int64(value[0] * steps), wp.int64(value[1] * steps)
    if (a | b) != wp.int64(0):  # samples that no light reaches cost no traffic
        wp.atomic_add(total, int(row), 0, a)
        wp.atomic_add(total, int(row), 1, b)


@wp.kernel(grid_stride=False)
def _scatter(
    points: wp.array2d(dtype=wp.float32),
    levels: wp.array(dtype=wp.vec3i),
    mask: wp.uint32,
    e_all: wp.array2d(dtype=wp.float32),
    g_all: wp.array2d(dtype=wp.float32),
    up: wp.array2d(dtype=wp.float32),
    state: wp.array(dtype=wp.float32),
    total: wp.array2d(dtype=wp.int64),
):
    """Gradient of sum(encode * e) + sum(J^T g * up) in the table; a term whose array is empty is left out."""
    level, p = wp.tid()
    rows, f = _locate(points, p, levels[level], mask)
    e, g, u = wp.vec2(), wp.vec2(), wp.vec3()
    if e_all.shape[0] > 0:
        e = wp.vec2(e_all[p, 2 * level], e_all[p, 2 * level + 1])
    if g_all.shape[0] > 0:
        g = wp.vec2(g_all[p, 2 * level], g_all[p, 2 * level + 1])
        u = _direction(points, up, p, float(levels[level][0]))
    if not (wp.isfinite(e) and wp.isfinite(g) and wp.isfinite(u) and wp.isfinite(f)):
        state[2] = 1.0
        return
    w, s, steps = _weights(f), _slopes(f, u), state[0]
    gx = 1.0 - f[0]
    for k in range(4):
        _add(total, rows[2 * k], gx * w[k] * e + (gx * s[k] - u[0] * w[k]) * g, steps)
        _add(total, rows[2 * k + 1], f[0] * w[k] * e + (f[0] * s[k] + u[0] * w[k]) * g, steps)


@wp.kernel(grid_stride=False)
def _to_float(total: wp.array(dtype=wp.int64), state: wp.array(dtype=wp.float32), out: wp.array(dtype=wp.float32)):
    i = wp.tid()
    value = wp.float32(wp.float64(total[i]) * wp.float64(state[1]))
    out[i] = wp.where(state[2] != 0.0, NAN, value)


@lru_cache(maxsize=16)
def _levels(spec, device: torch.device) -> Tensor:
    """Resolution, first row and density of each level, [L, 3] int32; copied to the device once."""
    columns = zip(spec.resolutions, spec.offsets[:-1], spec.dense, strict=True)
    return torch.tensor([[int(v) for v in column] for column in columns], dtype=torch.int32).to(device)


def _grid(points: Tensor, spec) -> tuple[Tensor, int]:
    return _levels(spec, points.device), (1 << spec.log2_table) - 1


def _packed(table: Tensor) -> Tensor:
    """The rows [T] of a table as one int64 each."""
    table = table.detach().contiguous()
    if table.data_ptr() % 8:  # a slice of something larger
        table = table.clone()
    return table.view(torch.int64)[:, 0]


def _features(points: Tensor, spec) -> Tensor:
    """Room for features [N, 2 L], stored feature by feature."""
    return points.new_empty(spec.width, points.shape[0]).T


def encode(points: Tensor, table: Tensor, spec) -> Tensor:
    """Return features [N, 2 L]."""
    out = _features(points, spec)
    launch(_encode, (spec.levels, points.shape[0]), (points, _packed(table), *_grid(points, spec), out))
    return out


def gradient(points: Tensor, table: Tensor, spec, g: Tensor) -> Tensor:
    """Return J^T g, [N, 3]."""
    out = points.new_empty(points.shape[0], 3)
    launch(_gradient, points.shape[0], (points, _packed(table), *_grid(points, spec), g, out))
    return out


def directional(points: Tensor, table: Tensor, spec, up: Tensor) -> Tensor:
    """Return J up, [N, 2 L]: the gradient of J^T g in g."""
    out = _features(points, spec)
    launch(_directional, (spec.levels, points.shape[0]), (points, _packed(table), *_grid(points, spec), up, out))
    return out


def scatter(points: Tensor, spec, e: Tensor | None, g: Tensor | None, up: Tensor | None) -> Tensor:
    """Gradient [T, 2] in the table of sum(encode * e) + sum(J^T g * up); either term may be None."""
    n = points.shape[0]
    out = points.new_zeros(spec.rows, 2)
    if not n or (e is None and g is None):
        return out
    none = points.new_zeros(1)
    largest = [none if v is None else torch.linalg.vector_norm(v, math.inf).view(1) for v in (e, g, up)]
    state = points.new_zeros(3)
    spare = 61 - math.ceil(math.log2(n))
    launch(_scale, 1, (*largest, max(spec.resolutions), spare, state))
    terms = [points.new_empty(0, 0) if v is None else v for v in (e, g, up)]
    total = torch.zeros(spec.rows, 2, dtype=torch.int64, device=points.device)
    launch(_scatter, (spec.levels, n), (points, *_grid(points, spec), *terms, state, total))
    launch(_to_float, 2 * spec.rows, (total.view(-1), state, out.view(-1)))
    return out


def encode_backward(points: Tensor, spec, grad: Tensor) -> Tensor:
    """Gradient of the encoding in the table."""
    return scatter(points, spec, grad, None, None)


def gradient_backward_table(points: Tensor, spec, g: Tensor, grad: Tensor) -> Tensor:
    """Gradient of J^T g in the table."""
    return scatter(points, spec, None, g, grad)
