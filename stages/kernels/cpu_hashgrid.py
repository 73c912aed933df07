"""Hash-grid ops for the CPU (numba), F = 2 features per level; definitions in reference_hashgrid.py.

Forward ops run over blocks of points with the levels inside (a block's outputs stay in L1/L2). Scatters run in parallel
over groups of levels, each group walking the points in order: no atomics, and the same bytes at any thread count.
No fastmath: contracting x * resolution - floor(...) would move features at the finest levels by 4e-4.
"""

from __future__ import annotations

from functools import lru_cache

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

PRIME_Y, PRIME_Z = 2654435761, 805459861
BLOCK = 256  # points per block: 32 kB of 32 float32 features
_u = np.uint64


@njit(inline="always")
def _rows(ix, iy, iz, resolution, mask, dense):
    """The eight rows of a cell, x fastest; mask is the hashed level's size - 1."""
    if dense:
        side = resolution + 1
        y0, z0 = iy * side, iz * side * side
        y1, z1 = y0 + side, z0 + side * side
        a, b, c, d = y0 + z0 + ix, y1 + z0 + ix, y0 + z1 + ix, y1 + z1 + ix
        return _u(a), _u(a + 1), _u(b), _u(b + 1), _u(c), _u(c + 1), _u(d), _u(d + 1)
    y0, z0 = iy * PRIME_Y, iz * PRIME_Z
    y1, z1 = y0 + PRIME_Y, z0 + PRIME_Z
    x1 = ix + 1
    a, b, c, d = y0 ^ z0, y1 ^ z0, y0 ^ z1, y1 ^ z1
    return (
        _u((ix ^ a) & mask), _u((x1 ^ a) & mask), _u((ix ^ b) & mask), _u((x1 ^ b) & mask),
        _u((ix ^ c) & mask), _u((x1 ^ c) & mask), _u((ix ^ d) & mask), _u((x1 ^ d) & mask),
    )  # fmt: skip


@njit(inline="always")
def _cell(value, resolution):
    """Cell index and fraction of one coordinate, clamped into [0, 1]."""
    scaled = min(max(value, np.float32(0)), np.float32(1)) * np.float32(resolution)
    index = min(np.int64(scaled), resolution - 1)
    return index, scaled - np.float32(index)


@njit(parallel=True, cache=True)
def _encode(points, table, resolutions, offsets, dense, mask, out):
    n, levels = points.shape[0], resolutions.shape[0]
    one = np.float32(1)
    for block in prange((n + BLOCK - 1) // BLOCK):
        low, high = block * BLOCK, min(n, (block + 1) * BLOCK)
        for level in range(levels):
            resolution, is_dense = resolutions[level], dense[level]
            rows = table[offsets[level] :]
            for p in range(low, high):
                ix, fx = _cell(points[p, 0], resolution)
                iy, fy = _cell(points[p, 1], resolution)
                iz, fz = _cell(points[p, 2], resolution)
                a, b, c, d, e, f, g, h = _rows(ix, iy, iz, resolution, mask, is_dense)
                gx, gy, gz = one - fx, one - fy, one - fz
                w00, w10, w01, w11 = gy * gz, fy * gz, gy * fz, fy * fz
                for k in range(2):
                    low_x = w00 * rows[a, k] + w10 * rows[c, k] + w01 * rows[e, k] + w11 * rows[g, k]
                    high_x = w00 * rows[b, k] + w10 * rows[d, k] + w01 * rows[f, k] + w11 * rows[h, k]
                    out[p, 2 * level + k] = gx * low_x + fx * high_x


@njit(parallel=True, cache=True)
def _gradient(points, table, resolutions, offsets, dense, mask, g_all, out):
    n, levels = points.shape[0], resolutions.shape[0]
    one, zero = np.float32(1), np.float32(0)
    for block in prange((n + BLOCK - 1) // BLOCK):
        low, high = block * BLOCK, min(n, (block + 1) * BLOCK)
        for level in range(levels):
            resolution, is_dense = resolutions[level], dense[level]
            scale = np.float32(resolution)
            rows = table[offsets[level] :]
            for p in range(low, high):
                ix, fx = _cell(points[p, 0], resolution)
                iy, fy = _cell(points[p, 1], resolution)
                iz, fz = _cell(points[p, 2], resolution)
                a, b, c, d, e, f, g, h = _rows(ix, iy, iz, resolution, mask, is_dense)
                g0, g1 = g_all[p, 2 * level], g_all[p, 2 * level + 1]
                va, vb = rows[a, 0] * g0 + rows[a, 1] * g1, rows[b, 0] * g0 + rows[b, 1] * g1
                vc, vd = rows[c, 0] * g0 + rows[c, 1] * g1, rows[d, 0] * g0 + rows[d, 1] * g1
                ve, vf = rows[e, 0] * g0 + rows[e, 1] * g1, rows[f, 0] * g0 + rows[f, 1] * g1
                vg, vh = rows[g, 0] * g0 + rows[g, 1] * g1, rows[h, 0] * g0 + rows[h, 1] * g1
                gx, gy, gz = one - fx, one - fy, one - fz
                dx = gy * gz * (vb - va) + fy * gz * (vd - vc) + gy * fz * (vf - ve) + fy * fz * (vh - vg)
                p00, p10 = gx * va + fx * vb, gx * vc + fx * vd  # [y, z] = 00, 10
                p01, p11 = gx * ve + fx * vf, gx * vg + fx * vh
                dy = gz * (p10 - p00) + fz * (p11 - p01)
                dz = gy * (p01 - p00) + fy * (p11 - p10)
                out[p, 0] += scale * dx
                out[p, 1] += scale * dy
                out[p, 2] += scale * dz
        for p in range(low, high):
            for axis in range(3):
                if points[p, axis] < zero or points[p, axis] > one:
                    out[p, axis] = zero


@njit(inline="always")
def _direction(points, up, p, scale):
    """Upstream gradient of one point in cell units, zero along clamped axes."""
    zero, one = np.float32(0), np.float32(1)
    x = up[p, 0] * scale if zero <= points[p, 0] <= one else zero
    y = up[p, 1] * scale if zero <= points[p, 1] <= one else zero
    z = up[p, 2] * scale if zero <= points[p, 2] <= one else zero
    return x, y, z


@njit(parallel=True, cache=True)
def _directional(points, table, resolutions, offsets, dense, mask, up, out):
    """J(points) up: derivative of each feature along `up`."""
    n, levels = points.shape[0], resolutions.shape[0]
    one = np.float32(1)
    for block in prange((n + BLOCK - 1) // BLOCK):
        low, high = block * BLOCK, min(n, (block + 1) * BLOCK)
        for level in range(levels):
            resolution, is_dense = resolutions[level], dense[level]
            rows = table[offsets[level] :]
            for p in range(low, high):
                ix, fx = _cell(points[p, 0], resolution)
                iy, fy = _cell(points[p, 1], resolution)
                iz, fz = _cell(points[p, 2], resolution)
                a, b, c, d, e, f, g, h = _rows(ix, iy, iz, resolution, mask, is_dense)
                ux, uy, uz = _direction(points, up, p, np.float32(resolution))
                gx, gy, gz = one - fx, one - fy, one - fz
                w00, w10, w01, w11 = gy * gz, fy * gz, gy * fz, fy * fz
                k00, k10 = -uy * gz - uz * gy, uy * gz - uz * fy
                k01, k11 = -uy * fz + uz * gy, uy * fz + uz * fy
                for k in range(2):
                    low_x = (gx * k00 - ux * w00) * rows[a, k] + (gx * k10 - ux * w10) * rows[c, k]
                    low_x += (gx * k01 - ux * w01) * rows[e, k] + (gx * k11 - ux * w11) * rows[g, k]
                    high_x = (fx * k00 + ux * w00) * rows[b, k] + (fx * k10 + ux * w10) * rows[d, k]
                    high_x += (fx * k01 + ux * w01) * rows[f, k] + (fx * k11 + ux * w11) * rows[h, k]
                    out[p, 2 * level + k] = low_x + high_x


@njit(parallel=True, cache=True)
def _scatter(points, resolutions, offsets, dense, mask, groups, e_all, g_all, up, with_e, with_g, out):
    """Gradient of sum(encode * e) + sum(J^T g * up) in the table; the two terms are switched by with_e and with_g."""
    n, levels = points.shape[0], resolutions.shape[0]
    one, zero = np.float32(1), np.float32(0)
    for group in prange(groups):
        for low in range(0, n, BLOCK):
            high = min(n, low + BLOCK)
            for level in range(group, levels, groups):
                resolution, is_dense = resolutions[level], dense[level]
                rows = out[offsets[level] :]
                for p in range(low, high):
                    ix, fx = _cell(points[p, 0], resolution)
                    iy, fy = _cell(points[p, 1], resolution)
                    iz, fz = _cell(points[p, 2], resolution)
                    a, b, c, d, e, f, g, h = _rows(ix, iy, iz, resolution, mask, is_dense)
                    gx, gy, gz = one - fx, one - fy, one - fz
                    w00, w10, w01, w11 = gy * gz, fy * gz, gy * fz, fy * fz
                    e0 = e1 = g0 = g1 = ux = uy = uz = zero
                    if with_e:
                        e0, e1 = e_all[p, 2 * level], e_all[p, 2 * level + 1]
                    if with_g:
                        g0, g1 = g_all[p, 2 * level], g_all[p, 2 * level + 1]
                        ux, uy, uz = _direction(points, up, p, np.float32(resolution))
                    k00, k10 = -uy * gz - uz * gy, uy * gz - uz * fy
                    k01, k11 = -uy * fz + uz * gy, uy * fz + uz * fy
                    for row, w, u in (
                        (a, gx * w00, gx * k00 - ux * w00),
                        (b, fx * w00, fx * k00 + ux * w00),
                        (c, gx * w10, gx * k10 - ux * w10),
                        (d, fx * w10, fx * k10 + ux * w10),
                        (e, gx * w01, gx * k01 - ux * w01),
                        (f, fx * w01, fx * k01 + ux * w01),
                        (g, gx * w11, gx * k11 - ux * w11),
                        (h, fx * w11, fx * k11 + ux * w11),
                    ):
                        rows[row, 0] += w * e0 + u * g0
                        rows[row, 1] += w * e1 + u * g1


@lru_cache(maxsize=16)
def _layout(spec) -> tuple:
    as_int = [np.array(v, dtype=np.int64) for v in (spec.resolutions, spec.offsets)]
    return (*as_int, np.array(spec.dense, dtype=np.bool_), (1 << spec.log2_table) - 1)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _groups(spec) -> int:
    """Tasks for the scatter: a few per thread, so that cheap dense levels and dear hashed ones even out."""
    return min(spec.levels, 2 * numba.get_num_threads())


def encode(points: Tensor, table: Tensor, spec) -> Tensor:
    """Features [N, 2 L]."""
    out = torch.empty(points.shape[0], spec.width)
    _encode(_array(points), _array(table), *_layout(spec), out.numpy())
    return out


def gradient(points: Tensor, table: Tensor, spec, g: Tensor) -> Tensor:
    """J^T g, [N, 3]."""
    out = torch.zeros(points.shape[0], 3)
    _gradient(_array(points), _array(table), *_layout(spec), _array(g), out.numpy())
    return out


def directional(points: Tensor, table: Tensor, spec, up: Tensor) -> Tensor:
    """J up, [N, 2 L]: the gradient of J^T g in g."""
    out = torch.empty(points.shape[0], spec.width)
    _directional(_array(points), _array(table), *_layout(spec), _array(up), out.numpy())
    return out


def scatter(points: Tensor, spec, e: Tensor | None, g: Tensor | None, up: Tensor | None) -> Tensor:
    """Gradient [T, 2] in the table of sum(encode * e) + sum(J^T g * up); either term may be None."""
    out = torch.zeros(spec.rows, 2)
    none = np.zeros((0, 0), dtype=np.float32)
    e_, g_, up_ = (none if v is None else _array(v) for v in (e, g, up))
    _scatter(
        _array(points), *_layout(spec), _groups(spec), e_, g_, up_, e is not None, g is not None, out.numpy()
    )  # fmt: skip
    return out


def encode_backward(points: Tensor, spec, grad: Tensor) -> Tensor:
    """Gradient of the encoding in the table."""
    return scatter(points, spec, grad, None, None)


def gradient_backward_table(points: Tensor, spec, g: Tensor, grad: Tensor) -> Tensor:
    """Gradient of J^T g in the table."""
    return scatter(points, spec, None, g, grad)
