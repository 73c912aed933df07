"""Warp kernels behind stages/kernels/raster.py: z-buffer and interpolation, forward and backward.

Functions mirror those of cpu/raster.py, on contiguous tensors of one device. Same seed, same bytes: whatever the order
of the threads, a pixel keeps the smallest (depth, triangle) and a gradient is a sum of whole numbers (cuda/sums.py).
The modules are compiled without fused multiply-adds, so that coverage and depth round as they do in the twin.

The z-buffer holds one int64 a pixel: z/w in steps of 2^-38 above the triangle, and a 64-bit atomic minimum sorts by
both. Depths within one step of each other count as equal: 3.6e-12, far below what float32 coordinates resolve.

Every triangle is cut into tiles of 8 x 8 pixels from the corner of its bounding box. One thread a triangle draws the
first tile, which is all there is to most triangles of a fine mesh. The other tiles, numbered by a prefix sum over the
triangles, are shared out evenly in a second pass: a fixed number of threads, each of which finds the owner of its
next tile by bisection. So a triangle as large as the image occupies thousands of threads and not one, and the number of
tiles never has to reach the host.

Letters: B views, V vertices, F triangles, H rows, W columns, C channels; `screen` [B, V] holds float64 x, y in pixels
and z/w. Edge functions are float64 and always taken from the same end, as in cpu/raster.py.
"""

from __future__ import annotations

import math

import torch
import warp as wp
from torch import Tensor

from stages.kernels.cuda import sums as cuda_sums
from stages.kernels.cuda.launch import launch
from stages.kernels.reference.raster import AREA_MIN, PIXELS_MAX, W_MIN

wp.set_module_options({"enable_backward": False, "fuse_fp": False})

SIDE = 8  # of a tile, in pixels
WORKERS = {"cuda": 1 << 17, "cpu": 64}  # threads that share the further tiles
NONE = (1 << 63) - 1

f64 = wp.float64
TILE = wp.constant(SIDE)
EMPTY = wp.constant(wp.int64(NONE))
ID_BITS = wp.constant(wp.int64(24))  # TRIANGLES_MAX of kernels/raster.py is 2^24
ID_MASK = wp.constant(wp.int64((1 << 24) - 1))
DEPTHS = wp.constant(wp.float64(1 << 38))  # of z + 1, which is at most 2
DEPTH_MAX = wp.constant(wp.int64((1 << 39) - 1))
NAN = wp.constant(wp.float64(math.nan))
ZERO = wp.constant(wp.float64(0.0))
HALF = wp.constant(wp.float64(0.5))
ONE = wp.constant(wp.float64(1.0))
TWO = wp.constant(wp.float64(2.0))
NEAR_W = wp.constant(wp.float64(W_MIN))
FAR_PIXELS = wp.constant(wp.float64(PIXELS_MAX))
LEAST_AREA = wp.constant(wp.float64(AREA_MIN))


@wp.kernel
def _project(clip: wp.array2d(dtype=wp.vec4f), height: int, width: int, screen: wp.array2d(dtype=wp.vec3d)):
    b, v = wp.tid()
    point = clip[b, v]
    w = f64(point[3])
    x, y, z = NAN, NAN, NAN
    if w > NEAR_W:
        x = (f64(point[0]) / w * HALF + HALF) * f64(width)
        y = (HALF - f64(point[1]) / w * HALF) * f64(height)
        z = f64(point[2]) / w
        if not (wp.abs(x) < FAR_PIXELS and wp.abs(y) < FAR_PIXELS):
            z = NAN
    screen[b, v] = wp.vec3d(x, y, z)


def project(clip: Tensor, height: int, width: int) -> Tensor:
    """Screen coordinates [B, V, 3] float64 of clip [B, V, 4] float32; z/w is nan where a vertex cannot be drawn."""
    screen = torch.empty(*clip.shape[:2], 3, dtype=torch.float64, device=clip.device)
    launch(_project, clip.shape[:2], (clip, height, width, screen))
    return screen


@wp.func
def _area(p: wp.vec3d, q: wp.vec3d, r: wp.vec3d):
    return (q[0] - p[0]) * (r[1] - p[1]) - (r[0] - p[0]) * (q[1] - p[1])


@wp.func
def _first(low: wp.float64, size: int):
    """First pixel whose centre is not below a coordinate, in [0, size]."""
    return int(wp.ceil(wp.clamp(low, ZERO, f64(size)) - HALF))


@wp.func
def _stop(high: wp.float64, size: int):
    """One past the last pixel whose centre is not above a coordinate, in [0, size]."""
    return int(wp.floor(wp.clamp(high, ZERO, f64(size)) - HALF)) + 1


@wp.func
def _box(p: wp.vec3d, q: wp.vec3d, r: wp.vec3d, height: int, width: int):
    """Columns [0, 1) and rows [2, 3) of the pixels a triangle can cover; none where it cannot be drawn."""
    box = wp.vec4i(0, 0, 0, 0)
    if not wp.isnan(p[2] + q[2] + r[2]) and wp.abs(_area(p, q, r)) > LEAST_AREA:
        left = _first(wp.min(wp.min(p[0], q[0]), r[0]), width)
        right = _stop(wp.max(wp.max(p[0], q[0]), r[0]), width)
        top = _first(wp.min(wp.min(p[1], q[1]), r[1]), height)
        bottom = _stop(wp.max(wp.max(p[1], q[1]), r[1]), height)
        if left < right and top < bottom:
            box = wp.vec4i(left, right, top, bottom)
    return box


@wp.func
def _tiles(box: wp.vec4i):
    return ((box[1] - box[0] + TILE - 1) // TILE) * ((box[3] - box[2] + TILE - 1) // TILE)


@wp.func
def _edge(p: wp.vec3d, q: wp.vec3d, sign: wp.float64):
    """Coefficients of A x + (B y + C), positive on the inner side of the line p-q; always taken from the same end."""
    s, e, turn = p, q, sign
    if p[0] > q[0] or (p[0] == q[0] and p[1] > q[1]):
        s, e, turn = q, p, -sign
    a = -(e[1] - s[1])
    b = e[0] - s[0]
    return wp.vec3d(turn * a, turn * b, turn * -(a * s[0] + b * s[1]))


@wp.func
def _at(edge: wp.vec3d, x: int, y: int):
    return edge[0] * (f64(x) + HALF) + (edge[1] * (f64(y) + HALF) + edge[2])


@wp.func
def _misses(edge: wp.vec3d, left: int, right: int, top: int, bottom: int):
    """Whether all of a tile lies outside an edge: rounding is monotonic, so its innermost pixel speaks for the rest."""
    x = left
    if edge[0] > ZERO:
        x = right - 1
    y = top
    if edge[1] > ZERO:
        y = bottom - 1
    return _at(edge, x, y) < ZERO


@wp.func
def _draw(
    p: wp.vec3d, q: wp.vec3d, r: wp.vec3d, box: wp.vec4i, tile: int, b: int, f: int, nearest: wp.array3d(dtype=wp.int64)
):
    columns = (box[1] - box[0] + TILE - 1) // TILE
    left, top = box[0] + TILE * (tile % columns), box[2] + TILE * (tile // columns)
    right, bottom = wp.min(left + TILE, box[1]), wp.min(top + TILE, box[3])
    area = _area(p, q, r)
    sign = wp.sign(area)
    e0, e1, e2 = _edge(q, r, sign), _edge(r, p, sign), _edge(p, q, sign)
    if _misses(e0, left, right, top, bottom):
        return
    if _misses(e1, left, right, top, bottom) or _misses(e2, left, right, top, bottom):
        return
    inverse = ONE / wp.abs(area)
    for y in range(top, bottom):
        for x in range(left, right):
            w0, w1, w2 = _at(e0, x, y), _at(e1, x, y), _at(e2, x, y)
            if w0 >= ZERO and w1 >= ZERO and w2 >= ZERO:
                z = (w0 * p[2] + w1 * q[2] + w2 * r[2]) * inverse
                if z >= -ONE and z <= ONE:
                    depth = wp.min(wp.int64((z + ONE) * DEPTHS), DEPTH_MAX)
                    key = (depth << ID_BITS) | wp.int64(f)
                    if key < nearest[b, y, x]:
                        wp.atomic_min(nearest, b, y, x, key)


@wp.kernel
def _first_tiles(
    screen: wp.array2d(dtype=wp.vec3d),
    triangles: wp.array(dtype=wp.vec3i),
    height: int,
    width: int,
    nearest: wp.array3d(dtype=wp.int64),
    further: wp.array2d(dtype=wp.int32),
):
    b, f = wp.tid()
    i = triangles[f]
    p, q, r = screen[b, i[0]], screen[b, i[1]], screen[b, i[2]]
    box = _box(p, q, r, height, width)
    tiles = _tiles(box)
    further[b, f] = wp.max(tiles - 1, 0)
    if tiles > 0:
        _draw(p, q, r, box, 0, b, f, nearest)


@wp.kernel
def _further_tiles(
    screen: wp.array2d(dtype=wp.vec3d),
    triangles: wp.array(dtype=wp.vec3i),
    height: int,
    width: int,
    ends: wp.array(dtype=wp.int64),
    workers: int,
    nearest: wp.array3d(dtype=wp.int64),
):
    count, faces = ends.shape[0], triangles.shape[0]
    item, total = wp.int64(wp.tid()), ends[count - 1]
    while item < total:
        low, high = int(0), int(count - 1)  # the first end beyond this tile
        while low < high:
            middle = low + (high - low) // 2
            if ends[middle] > item:
                high = middle
            else:
                low = middle + 1
        b, f = low // faces, low % faces
        i = triangles[f]
        p, q, r = screen[b, i[0]], screen[b, i[1]], screen[b, i[2]]
        _draw(p, q, r, _box(p, q, r, height, width), int(ends[low] - item), b, f, nearest)
        item += wp.int64(workers)


@wp.func
def _about_pixel(point: wp.vec4f, fx: wp.float64, fy: wp.float64):
    """Clip x and y of a corner with the pixel's ray moved to the origin: homogeneous, perspective-exact."""
    w = f64(point[3])
    return wp.vec2d(f64(point[0]) - fx * w, f64(point[1]) - fy * w)


@wp.func
def _cross(a: wp.vec2d, b: wp.vec2d):
    return a[0] * b[1] - a[1] * b[0]


@wp.func
def _ray(index: int, size: int):
    return TWO * (f64(index) + HALF) / f64(size) - ONE


@wp.kernel
def _resolve(
    clip: wp.array2d(dtype=wp.vec4f),
    screen: wp.array2d(dtype=wp.vec3d),
    triangles: wp.array(dtype=wp.vec3i),
    nearest: wp.array3d(dtype=wp.int64),
    rast: wp.array3d(dtype=wp.vec4f),
):
    b, y, x = wp.tid()
    key = nearest[b, y, x]
    out = wp.vec4f()
    if key != EMPTY:
        f = int(key & ID_MASK)
        i = triangles[f]
        p, q, r = screen[b, i[0]], screen[b, i[1]], screen[b, i[2]]
        area = _area(p, q, r)
        sign = wp.sign(area)
        w0, w1, w2 = _at(_edge(q, r, sign), x, y), _at(_edge(r, p, sign), x, y), _at(_edge(p, q, sign), x, y)
        z = (w0 * p[2] + w1 * q[2] + w2 * r[2]) * (ONE / wp.abs(area))
        fx, fy = _ray(x, nearest.shape[2]), -_ray(y, nearest.shape[1])
        a0 = _about_pixel(clip[b, i[0]], fx, fy)
        a1 = _about_pixel(clip[b, i[1]], fx, fy)
        a2 = _about_pixel(clip[b, i[2]], fx, fy)
        d0, d1 = _cross(a1, a2), _cross(a2, a0)
        scale = ONE / (d0 + d1 + _cross(a0, a1))
        out = wp.vec4f(wp.float32(d0 * scale), wp.float32(d1 * scale), wp.float32(z), wp.float32(f + 1))
    rast[b, y, x] = out


def rasterise_forward(clip: Tensor, triangles: Tensor, rast: Tensor) -> None:
    """Fill rast [B, H, W, 4] from clip [B, V, 4] float32 and triangles [F, 3] int32; never waits for the device."""
    batch, height, width, _ = rast.shape
    nearest = torch.full(rast.shape[:3], NONE, dtype=torch.int64, device=rast.device)
    screen = project(clip, height, width)
    if batch and len(triangles):
        further = torch.empty(batch, len(triangles), dtype=torch.int32, device=rast.device)
        launch(_first_tiles, tuple(further.shape), (screen, triangles, height, width, nearest, further))
        ends = further.reshape(-1).cumsum(0, dtype=torch.int64)
        workers = WORKERS[rast.device.type]
        launch(_further_tiles, workers, (screen, triangles, height, width, ends, workers, nearest))
    launch(_resolve, rast.shape[:3], (clip, screen, triangles, nearest, rast))


@wp.func
def _add_corner(
    peak: wp.array(dtype=wp.float32),
    total: wp.array(dtype=wp.int64),
    unit: wp.float64,
    row: int,
    g: wp.vec2d,
    fx: wp.float64,
    fy: wp.float64,
):
    """Gradient of a vertex [x, y, z, w] from that of its position about the pixel; none goes to z."""
    cuda_sums.add(peak, total, unit, 4 * row, g[0])
    cuda_sums.add(peak, total, unit, 4 * row + 1, g[1])
    cuda_sums.add(peak, total, unit, 4 * row + 3, -(fx * g[0] + fy * g[1]))


@wp.kernel
def _rasterise_back(
    clip: wp.array2d(dtype=wp.vec4f),
    triangles: wp.array(dtype=wp.vec3i),
    rast: wp.array3d(dtype=wp.vec4f),
    grad: wp.array3d(dtype=wp.vec4f),
    peak: wp.array(dtype=wp.float32),
    total: wp.array(dtype=wp.int64),
    unit: wp.float64,
):
    b, y, x = wp.tid()
    f = int(rast[b, y, x][3]) - 1
    gu, gv = f64(grad[b, y, x][0]), f64(grad[b, y, x][1])
    if f < 0 or (gu == ZERO and gv == ZERO):
        return
    fx, fy = _ray(x, rast.shape[2]), -_ray(y, rast.shape[1])
    i = triangles[f]
    p = _about_pixel(clip[b, i[0]], fx, fy)
    q = _about_pixel(clip[b, i[1]], fx, fy)
    r = _about_pixel(clip[b, i[2]], fx, fy)
    d0, d1 = _cross(q, r), _cross(r, p)
    scale = ONE / (d0 + d1 + _cross(p, q))
    mean = (gu * d0 + gv * d1) * scale
    h0, h1, h2 = (gu - mean) * scale, (gv - mean) * scale, -mean * scale
    first = b * clip.shape[1]
    gp = wp.vec2d(h2 * q[1] - h1 * r[1], h1 * r[0] - h2 * q[0])
    gq = wp.vec2d(h0 * r[1] - h2 * p[1], h2 * p[0] - h0 * r[0])
    gr = wp.vec2d(h1 * p[1] - h0 * q[1], h0 * q[0] - h1 * p[0])
    _add_corner(peak, total, unit, first + i[0], gp, fx, fy)
    _add_corner(peak, total, unit, first + i[1], gq, fx, fy)
    _add_corner(peak, total, unit, first + i[2], gr, fx, fy)


def rasterise_backward(clip: Tensor, triangles: Tensor, rast: Tensor, grad: Tensor) -> Tensor:
    """Gradient [B, V, 4] of clip from that of rast [B, H, W, 4], of which u and v count."""

    def run(peak: Tensor, total: Tensor, unit: float) -> None:
        launch(_rasterise_back, rast.shape[:3], (clip, triangles, rast, grad, peak, total, unit))

    return cuda_sums.collect(clip.shape, 3 * rast.shape[1] * rast.shape[2], clip.device, run).float()


@wp.kernel
def _interpolate(
    attributes: wp.array3d(dtype=wp.float32),
    rast: wp.array3d(dtype=wp.vec4f),
    triangles: wp.array(dtype=wp.vec3i),
    out: wp.array4d(dtype=wp.float32),
):
    b, y, x, k = wp.tid()
    at = rast[b, y, x]
    f = int(at[3]) - 1
    value = wp.float32(0.0)
    if f >= 0:
        i = triangles[f]
        n = wp.min(b, attributes.shape[0] - 1)
        w = wp.float32(1.0) - at[0] - at[1]
        value = at[0] * attributes[n, i[0], k] + at[1] * attributes[n, i[1], k] + w * attributes[n, i[2], k]
    out[b, y, x, k] = value


def interpolate_forward(attributes: Tensor, rast: Tensor, triangles: Tensor, out: Tensor) -> None:
    """Fill out [B, H, W, C] from attributes [1 or B, V, C]."""
    launch(_interpolate, tuple(out.shape), (attributes, rast, triangles, out))


@wp.kernel
def _interpolate_back(
    attributes: wp.array3d(dtype=wp.float32),
    rast: wp.array3d(dtype=wp.vec4f),
    triangles: wp.array(dtype=wp.vec3i),
    grad: wp.array4d(dtype=wp.float32),
    peak: wp.array(dtype=wp.float32),
    total: wp.array(dtype=wp.int64),
    unit: wp.float64,
    grad_rast: wp.array3d(dtype=wp.vec4f),
):
    b, y, x = wp.tid()
    at = rast[b, y, x]
    f = int(at[3]) - 1
    gu, gv = f64(0.0), f64(0.0)
    if f >= 0:
        i = triangles[f]
        n = wp.min(b, attributes.shape[0] - 1)
        first, channels = n * attributes.shape[1], attributes.shape[2]
        w = wp.float32(1.0) - at[0] - at[1]
        for k in range(channels):
            g = grad[b, y, x, k]
            cuda_sums.add(peak, total, unit, (first + i[0]) * channels + k, f64(at[0] * g))
            cuda_sums.add(peak, total, unit, (first + i[1]) * channels + k, f64(at[1] * g))
            cuda_sums.add(peak, total, unit, (first + i[2]) * channels + k, f64(w * g))
            last = attributes[n, i[2], k]
            gu += f64(g * (attributes[n, i[0], k] - last))
            gv += f64(g * (attributes[n, i[1], k] - last))
    grad_rast[b, y, x] = wp.vec4f(wp.float32(gu), wp.float32(gv), wp.float32(0.0), wp.float32(0.0))


def interpolate_backward(attributes: Tensor, rast: Tensor, triangles: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients of attributes [1 or B, V, C] and of rast [B, H, W, 4]."""
    grad_rast = torch.empty_like(rast)

    def run(peak: Tensor, total: Tensor, unit: float) -> None:
        arguments = (attributes, rast, triangles, grad, peak, total, unit, grad_rast)
        launch(_interpolate_back, rast.shape[:3], arguments)

    terms = 3 * rast.shape[1] * rast.shape[2] * (rast.shape[0] if attributes.shape[0] == 1 else 1)
    return cuda_sums.collect(attributes.shape, terms, attributes.device, run).float(), grad_rast
