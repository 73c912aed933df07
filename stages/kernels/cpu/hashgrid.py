"""Hash-grid ops for the CPU (numba), F = 2 features per level; definitions in reference/hashgrid.py.

Points are taken in blocks. For one block and level the rows of the cells' corners and the corners' weights are
computed first, points in the vector lanes, then the table is read or written point by point, so that nothing stands
between one memory access and the next. Scatters run in parallel over groups of levels, each group walking the points
in order: no atomics, and the same bytes at any thread count.
Where a level's rows fit no core's own cache, all points pass it before the next. Their features then lie level by level
meanwhile: reading two numbers of every row of [N, 2 L] for each level costs more than the table. The rows of a block
are asked for before its weights are computed.
No fastmath: contracting x * resolution - floor(...) would move features at the finest levels by 4e-4.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from stages.kernels.cpu.jit import njit
from stages.kernels.cpu.threads import each
from stages.kernels.cpu.vectors import BLOCK, CORNERS, fetch_rows, gather_dot, gather_sum, scatter_add, scatter_add_two

PRIME_Y, PRIME_Z = np.uint32(2654435761), np.uint32(805459861)
SPAN = 1024  # points that pass one level before the next: the level's rows stay in a cache
WIDE = 1 << 16  # rows of a hashed level, beyond which they do not fit a core's own cache
APART = 8  # levels from which on a point's features fill more than a cache line

# x [3, span] are points clamped into the box, nan where a point is not finite: it stays visible. Per block:
# f [3, BLOCK] fractions within the cell, and rows and weights [CORNERS, BLOCK]. Corner c is at
# (y, z) = (c & 1, c >> 1 & 1), at the cell's low x for c < 4 and its high x from 4.


@njit
def _load(points, first, last, x):
    zero, one = np.float32(0), np.float32(1)
    for p in range(first, last):
        nan = zero * points[p, 0] + zero * points[p, 1] + zero * points[p, 2]  # nan or 0
        for axis in range(3):
            value = points[p, axis]
            value = value if value > zero else zero
            x[axis, p - first] = (value if value < one else one) + nan


@njit
def _load_direction(points, up, first, last, u):
    """`up` as columns, zero along clamped axes."""
    zero, one = np.float32(0), np.float32(1)
    for axis in range(3):
        for p in range(first, last):
            u[axis, p - first] = up[p, axis] if zero <= points[p, axis] <= one else zero


@njit
def _locate(x, low, count, resolution, mask, dense, rows, f):
    """Rows of the corners of every point's cell, and the points' fractions in it; mask is a hashed level's rows - 1."""
    scale, last, zero = np.float32(resolution), np.int32(resolution - 1), np.float32(0)
    for axis in range(3):
        for p in range(count):
            scaled = x[axis, low + p] * scale
            index = np.int32(scaled if scaled > zero else zero)  # nan is in cell 0
            index = index if index < last else last
            f[axis, p] = scaled - np.float32(index)
            rows[axis, p] = np.uint32(index)
    one = np.uint32(1)
    if dense:
        side = np.uint32(resolution + 1)
        square = np.uint32(side * side)
        for p in range(count):
            a = np.uint32(rows[0, p] + np.uint32(rows[1, p] * side) + np.uint32(rows[2, p] * square))
            b, c = a + side, a + square
            d = b + square
            rows[0, p], rows[1, p], rows[2, p], rows[3, p] = a, b, c, d
            rows[4, p], rows[5, p], rows[6, p], rows[7, p] = a + one, b + one, c + one, d + one
    else:
        mask = np.uint32(mask)
        for p in range(count):
            x0 = rows[0, p]
            x1 = np.uint32(x0 + one)
            y0, z0 = np.uint32(rows[1, p] * PRIME_Y), np.uint32(rows[2, p] * PRIME_Z)
            y1, z1 = np.uint32(y0 + PRIME_Y), np.uint32(z0 + PRIME_Z)
            a, b, c, d = y0 ^ z0, y1 ^ z0, y0 ^ z1, y1 ^ z1
            rows[0, p], rows[1, p], rows[2, p], rows[3, p] = (
                (x0 ^ a) & mask, (x0 ^ b) & mask, (x0 ^ c) & mask, (x0 ^ d) & mask
            )  # fmt: skip
            rows[4, p], rows[5, p], rows[6, p], rows[7, p] = (
                (x1 ^ a) & mask, (x1 ^ b) & mask, (x1 ^ c) & mask, (x1 ^ d) & mask
            )  # fmt: skip


@njit
def _fetch(table, start, rows, count):
    for p in range(count):
        fetch_rows(table, start, rows, p)


@njit
def _weigh(f, count, weights):
    """Trilinear weights of the corners."""
    one = np.float32(1)
    for p in range(count):
        fx, fy, fz = f[0, p], f[1, p], f[2, p]
        gx, gy, gz = one - fx, one - fy, one - fz
        a, b, c, d = gy * gz, fy * gz, gy * fz, fy * fz
        weights[0, p], weights[1, p], weights[2, p], weights[3, p] = gx * a, gx * b, gx * c, gx * d
        weights[4, p], weights[5, p], weights[6, p], weights[7, p] = fx * a, fx * b, fx * c, fx * d


@njit
def _weigh_slopes(u, low, f, count, resolution, weights):
    """Derivatives of the corners' weights along u."""
    one, scale = np.float32(1), np.float32(resolution)
    for p in range(count):
        ux, uy, uz = u[0, low + p] * scale, u[1, low + p] * scale, u[2, low + p] * scale
        fx, fy, fz = f[0, p], f[1, p], f[2, p]
        gx, gy, gz = one - fx, one - fy, one - fz
        a, b, c, d = -uy * gz - uz * gy, uy * gz - uz * fy, uz * gy - uy * fz, uy * fz + uz * fy
        i, j, k, m = ux * gy * gz, ux * fy * gz, ux * gy * fz, ux * fy * fz
        weights[0, p], weights[1, p] = gx * a - i, gx * b - j
        weights[2, p], weights[3, p] = gx * c - k, gx * d - m
        weights[4, p], weights[5, p] = fx * a + i, fx * b + j
        weights[6, p], weights[7, p] = fx * c + k, fx * d + m


@njit
def _where(apart, width, level, point, column):
    """Return the offset of a point's pair of features of a level, and the stride to the next point's.

    In rows of points, or with `apart` in rows of levels.
    """
    return (level * width + 2 * point, 2) if apart else (point * width + column + 2 * level, width)


@njit(cache=True, nogil=True)
def _encode(part, points, table, resolutions, offsets, dense, mask, up, span, out, column):
    """Features of one span from a column of `out` on, or with `up` [N, 3] (else [0, 0]) their derivatives along it."""
    levels, along = resolutions.shape[0], up.shape[0] > 0
    first, last = part * span, min(len(points), (part + 1) * span)
    wide = span > SPAN
    apart = wide and levels >= APART
    level_major = np.empty((levels, 2 * (last - first)) if apart else (0, 0), np.float32)
    to = level_major if apart else out
    x, u = np.empty((3, last - first), np.float32), np.empty((3, last - first), np.float32)
    rows, f = np.empty((CORNERS, BLOCK), np.uint32), np.empty((3, BLOCK), np.float32)
    weights = np.empty((CORNERS, BLOCK), np.float32)
    _load(points, first, last, x)
    if along:
        _load_direction(points, up, first, last, u)
    for level in range(levels):
        for low in range(0, last - first, BLOCK):
            count = min(BLOCK, last - first - low)
            _locate(x, low, count, resolutions[level], mask, dense[level], rows, f)
            if wide and not dense[level]:
                _fetch(table, offsets[level], rows, count)
            if along:
                _weigh_slopes(u, low, f, count, resolutions[level], weights)
            else:
                _weigh(f, count, weights)
            at, step = _where(apart, to.shape[1], level, low if apart else first + low, column)
            for p in range(count):
                gather_sum(table, offsets[level], rows, weights, p, to, at + p * step)
    if apart:
        for p in range(last - first):
            for level in range(levels):
                out[first + p, column + 2 * level] = level_major[level, 2 * p]
                out[first + p, column + 2 * level + 1] = level_major[level, 2 * p + 1]


@njit
def _add_slopes(f, v, low, count, scale, total):
    """total [3, span] += the gradient of the interpolation of v [CORNERS, BLOCK] at one level."""
    one = np.float32(1)
    for p in range(count):
        fx, fy, fz = f[0, p], f[1, p], f[2, p]
        gx, gy, gz = one - fx, one - fy, one - fz
        dx = gy * gz * (v[4, p] - v[0, p]) + fy * gz * (v[5, p] - v[1, p])
        dx += gy * fz * (v[6, p] - v[2, p]) + fy * fz * (v[7, p] - v[3, p])
        a, b = gx * v[0, p] + fx * v[4, p], gx * v[1, p] + fx * v[5, p]
        c, d = gx * v[2, p] + fx * v[6, p], gx * v[3, p] + fx * v[7, p]
        total[0, low + p] += scale * dx
        total[1, low + p] += scale * (gz * (b - a) + fz * (d - c))
        total[2, low + p] += scale * (gy * (c - a) + fy * (d - b))


@njit(cache=True, nogil=True)
def _gradient(part, points, table, resolutions, offsets, dense, mask, g, apart, span, out):
    levels, one, zero = resolutions.shape[0], np.float32(1), np.float32(0)
    first, last = part * span, min(len(points), (part + 1) * span)
    x, total = np.empty((3, last - first), np.float32), np.zeros((3, last - first), np.float32)
    rows, f = np.empty((CORNERS, BLOCK), np.uint32), np.empty((3, BLOCK), np.float32)
    v = np.empty((CORNERS, BLOCK), np.float32)
    _load(points, first, last, x)
    for level in range(levels):
        for low in range(0, last - first, BLOCK):
            count = min(BLOCK, last - first - low)
            _locate(x, low, count, resolutions[level], mask, dense[level], rows, f)
            if span > SPAN and not dense[level]:
                _fetch(table, offsets[level], rows, count)
            at, step = _where(apart, g.shape[1], level, first + low, 0)
            for p in range(count):
                gather_dot(table, offsets[level], rows, p, g, at + p * step, v)
            _add_slopes(f, v, low, count, np.float32(resolutions[level]), total)
    for p in range(first, last):
        for axis in range(3):
            clamped, value = points[p, axis] < zero or points[p, axis] > one, total[axis, p - first]
            out[p, axis] = zero * value + zero if clamped else value  # 0, but nan stays


@njit(cache=True, nogil=True)
def _scatter(group, groups, points, resolutions, offsets, dense, mask, e, column, g, apart, up, span, out):
    """Gradient of sum(encode * e) + sum(J^T g * up) in every `groups`th level; a term counts if its arrays do.

    e may be wider than the levels and have theirs from a column on, but not beside g. apart: of e and g, see _where.
    """
    n, levels = points.shape[0], resolutions.shape[0]
    with_e, with_g = e.shape[0] > 0, g.shape[0] > 0
    width = e.shape[1] if with_e else g.shape[1]
    x, u = np.empty((3, span), np.float32), np.empty((3, span), np.float32)
    rows, f = np.empty((CORNERS, BLOCK), np.uint32), np.empty((3, BLOCK), np.float32)
    weights, slopes = np.empty((CORNERS, BLOCK), np.float32), np.empty((CORNERS, BLOCK), np.float32)
    for first in range(0, n, span):
        last = min(n, first + span)
        _load(points, first, last, x)
        if with_g:
            _load_direction(points, up, first, last, u)
        for level in range(group, levels, groups):
            for low in range(0, last - first, BLOCK):
                count = min(BLOCK, last - first - low)
                _locate(x, low, count, resolutions[level], mask, dense[level], rows, f)
                start = offsets[level]
                if span > SPAN and not dense[level]:
                    _fetch(out, start, rows, count)
                at, step = _where(apart, width, level, first + low, column)
                if with_e:
                    _weigh(f, count, weights)
                if with_g:
                    _weigh_slopes(u, low, f, count, resolutions[level], slopes)
                if with_e and with_g:
                    for p in range(count):
                        scatter_add_two(out, start, rows, p, weights, e, slopes, g, at + p * step)
                elif with_e:
                    for p in range(count):
                        scatter_add(out, start, rows, p, weights, e, at + p * step)
                elif with_g:
                    for p in range(count):
                        scatter_add(out, start, rows, p, slopes, g, at + p * step)


@lru_cache(maxsize=16)
def _layout(spec) -> tuple:
    as_int = [np.array(v, dtype=np.int64) for v in (spec.resolutions, spec.offsets)]
    return (*as_int, np.array(spec.dense, dtype=np.bool_), (1 << spec.log2_table) - 1)


def _array(tensor: Tensor | None) -> np.ndarray:
    return np.zeros((0, 0), np.float32) if tensor is None else tensor.detach().contiguous().numpy()


def _span(spec, points: int, tasks: int) -> int:
    """Points that pass one level before the next, a multiple of BLOCK; all of a task's where levels are large."""
    if 1 << spec.log2_table <= WIDE:
        return SPAN
    return max(SPAN, -(-points // (tasks * BLOCK)) * BLOCK)


@njit(cache=True, nogil=True)
def _part_levels(part, rows, column, out):
    """Pairs of numbers of SPAN points from rows of points, from a column on, into rows of levels."""
    first, last = part * SPAN, min(len(rows), (part + 1) * SPAN)
    for low in range(first, last, 64):
        for level in range(out.shape[0]):
            for p in range(low, min(last, low + 64)):
                out[level, 2 * p] = rows[p, column + 2 * level]
                out[level, 2 * p + 1] = rows[p, column + 2 * level + 1]


def _by_level(rows: np.ndarray, column: int, levels: int) -> np.ndarray:
    """[levels, 2 N] of [N, W]; nothing of nothing."""
    if not rows.size:
        return rows
    out = np.empty((levels, 2 * len(rows)), np.float32)
    each(-(-len(rows) // SPAN), _part_levels, rows, column, out)
    return out


def _features(points: Tensor, table: Tensor, spec, up: Tensor | None, out: Tensor | None = None, column: int = 0):
    out = torch.empty(points.shape[0], spec.width) if out is None else out
    span = _span(spec, len(points), torch.get_num_threads())
    arrays = (_array(points), _array(table), *_layout(spec), _array(up))
    each(-(-len(points) // span), _encode, *arrays, span, out.numpy(), column)
    return out


def encode(points: Tensor, table: Tensor, spec) -> Tensor:
    """Return features [N, 2 L]."""
    return _features(points, table, spec, None)


def encode_into(points: Tensor, table: Tensor, spec, out: Tensor, column: int) -> None:
    """Write features from a column of `out` [N, W] on."""
    _features(points, table, spec, None, out, column)


def directional(points: Tensor, table: Tensor, spec, up: Tensor) -> Tensor:
    """Return J up, [N, 2 L]: the gradient of J^T g in g."""
    return _features(points, table, spec, up)


def gradient(points: Tensor, table: Tensor, spec, g: Tensor) -> Tensor:
    """Return J^T g, [N, 3]."""
    out = torch.empty(points.shape[0], 3)
    span = _span(spec, len(points), torch.get_num_threads())
    apart, slopes = span > SPAN and spec.levels >= APART, _array(g)
    slopes = _by_level(slopes, 0, spec.levels) if apart else slopes
    arrays = (_array(points), _array(table), *_layout(spec), slopes, apart)
    each(-(-len(points) // span), _gradient, *arrays, span, out.numpy())
    return out


def scatter(points: Tensor, spec, e: Tensor | None, g: Tensor | None, up: Tensor | None, column: int = 0) -> Tensor:
    """Gradient [T, 2] in the table of sum(encode * e) + sum(J^T g * up); either term may be None.

    column: where the levels begin in an e that is wider than they are, without a second term.
    """
    out = torch.zeros(spec.rows, 2)
    groups = min(spec.levels, 2 * torch.get_num_threads())  # a few a thread: dense levels are cheap, hashed ones dear
    span, values, slopes = _span(spec, len(points), 1), _array(e), _array(g)
    apart = span > SPAN and spec.levels >= APART
    if apart:
        values, slopes = _by_level(values, column, spec.levels), _by_level(slopes, 0, spec.levels)
    arrays = (_array(points), *_layout(spec), values, column, slopes, apart, _array(up))
    each(groups, _scatter, groups, *arrays, span, out.numpy())
    return out


def encode_backward(points: Tensor, spec, grad: Tensor, column: int = 0) -> Tensor:
    """Gradient of the encoding in the table; `column` as in scatter."""
    return scatter(points, spec, grad, None, None, column)


def gradient_backward_table(points: Tensor, spec, g: Tensor, grad: Tensor) -> Tensor:
    """Gradient of J^T g in the table."""
    return scatter(points, spec, None, g, grad)
