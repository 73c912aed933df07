"""Warp kernels behind antialias and edge_topology of stages/kernels/raster.py; functions as in cpu/antialias.py.

One thread a pair of neighbouring pixels, as in the twin (the CPU's kernel goes by edges instead: a long edge would keep
one thread busy). A pair that shows two triangles is walked and leaves at most one crossing, stored at the pair's own
place: half-edge and weight [B, 2, H, W], axis 0 for a pixel and the one to its right, 1 for it and the one below. So
colours, and their gradients, are gathered from the four pairs of a pixel without atomics, and nothing is counted or
compacted. Only the gradient of the edges' ends is scattered; see cuda/sums.py.

Half-edge 3 f + k lies opposite corner k of triangle f, from corner k + 1 to corner k + 2.
"""

from __future__ import annotations

import math

import torch
import warp as wp
from torch import Tensor

from stages.kernels.cuda import sums as cuda_sums
from stages.kernels.cuda.launch import launch
from stages.kernels.cuda.raster import project
from stages.kernels.reference.antialias import STEPS_MAX

wp.set_module_options({"enable_backward": False, "fuse_fp": False})

f64 = wp.float64
STEPS = wp.constant(STEPS_MAX)
BACK, FRONT, UNDRAWABLE = wp.constant(0), wp.constant(1), wp.constant(2)
ZERO = wp.constant(wp.float64(0.0))
HALF = wp.constant(wp.float64(0.5))
ONE = wp.constant(wp.float64(1.0))
FURTHEST = wp.constant(wp.float64(-math.inf))


@wp.kernel
def _pair_up(key: wp.array(dtype=wp.int64), order: wp.array(dtype=wp.int64), opposite: wp.array(dtype=wp.int32)):
    """Half-edges sorted by both ends: two neighbours alone with their key, of two triangles, are each other's."""
    n = wp.tid()
    last = key.shape[0] - 1
    same_before = bool(n > 0 and key[wp.max(n - 1, 0)] == key[n])
    same_after = bool(n < last and key[wp.min(n + 1, last)] == key[n])
    e = int(order[n])
    mate = int(-1)
    if same_before != same_after:
        m = n - 1  # the neighbour with the same key, and the one beyond it
        beyond = n - 2
        if same_after:
            m = n + 1
            beyond = n + 2
        alone = bool(beyond < 0 or beyond > last or key[wp.clamp(beyond, 0, last)] != key[n])
        o = int(order[m])
        if alone and e // 3 != o // 3:
            mate = o
    opposite[e] = mate


def edge_topology(triangles: Tensor, vertices: int) -> Tensor:
    """Opposite half-edge of every half-edge [F, 3] int32, -1 without exactly one."""
    start, stop = triangles.roll(-1, 1).reshape(-1).long(), triangles.roll(-2, 1).reshape(-1).long()
    key = torch.minimum(start, stop) * vertices + torch.maximum(start, stop)  # [3 F]
    key, order = key.sort(stable=True)
    opposite = torch.empty(len(key), dtype=torch.int32, device=triangles.device)
    launch(_pair_up, len(key), (key, order, opposite))
    return opposite.reshape(-1, 3)


@wp.kernel
def _facing(
    screen: wp.array2d(dtype=wp.vec3d), triangles: wp.array(dtype=wp.vec3i), facing: wp.array2d(dtype=wp.int32)
):
    b, f = wp.tid()
    i = triangles[f]
    p, q, r = screen[b, i[0]], screen[b, i[1]], screen[b, i[2]]
    side = BACK
    if (q[0] - p[0]) * (r[1] - p[1]) - (r[0] - p[0]) * (q[1] - p[1]) > ZERO:
        side = FRONT
    if wp.isnan(p[2] + q[2] + r[2]):
        side = UNDRAWABLE
    facing[b, f] = side


@wp.func
def _silhouette(
    triangles: wp.array(dtype=wp.vec3i),
    opposite: wp.array2d(dtype=wp.int32),
    facing: wp.array2d(dtype=wp.int32),
    b: int,
    f: int,
    k: int,
):
    """Whether the surface ends or turns away at half-edge k of f: the two triangles lie on one side of the edge."""
    o = opposite[f, k]
    if o < 0:
        return True
    other = o // 3
    if facing[b, other] == UNDRAWABLE:
        return True
    against = triangles[f][(k + 1) % 3] != triangles[other][(o % 3 + 1) % 3]
    return (facing[b, f] == facing[b, other]) != against


@wp.func
def _crossing(p: wp.vec3d, q: wp.vec3d, line: wp.float64, along: int, across: int):
    """Return where, along one screen axis, the line through two points meets `line` on the other."""
    slope = (q[along] - p[along]) / (q[across] - p[across])
    return p[along] + (line - p[across]) * slope


@wp.func
def _distance(p: wp.vec3d, q: wp.vec3d, line: wp.float64, here: wp.float64, direction: wp.float64, along: int):
    """Return how far ahead of `here` the segment p-q crosses the line; minus infinity where it does not."""
    if (p[1 - along] > line) == (q[1 - along] > line):
        return FURTHEST
    return direction * (_crossing(p, q, line, along, 1 - along) - here)


@wp.func
def _first_silhouette(
    screen: wp.array2d(dtype=wp.vec3d),
    triangles: wp.array(dtype=wp.vec3i),
    opposite: wp.array2d(dtype=wp.int32),
    facing: wp.array2d(dtype=wp.int32),
    b: int,
    first: int,
    line: wp.float64,
    here: wp.float64,
    direction: wp.float64,
    along: int,
):
    """First silhouette half-edge met from a triangle along +-`along` within a pixel of `here`, or -1."""
    f = int(first)
    entered = int(-1)
    for _ in range(STEPS):
        best = int(-1)
        best_t = f64(FURTHEST)
        i = triangles[f]
        for k in range(3):
            t = _distance(screen[b, i[(k + 1) % 3]], screen[b, i[(k + 2) % 3]], line, here, direction, along)
            if k != entered and t > best_t:
                best = k
                best_t = t
        if best < 0 or best_t > ONE:
            return -1
        if _silhouette(triangles, opposite, facing, b, f, best):
            return 3 * f + best
        o = opposite[f, best]
        f = o // 3
        entered = o % 3
    return -1


@wp.kernel
def _walk_pairs(
    screen: wp.array2d(dtype=wp.vec3d),
    triangles: wp.array(dtype=wp.vec3i),
    opposite: wp.array2d(dtype=wp.int32),
    facing: wp.array2d(dtype=wp.int32),
    rast: wp.array3d(dtype=wp.vec4f),
    edges: wp.array4d(dtype=wp.int32),
    weights: wp.array4d(dtype=wp.float32),
):
    b, along, y, x = wp.tid()  # along 0: the pair lies in a row; 1: in a column
    edges[b, along, y, x] = -1
    weights[b, along, y, x] = wp.float32(0.0)
    y1, x1 = y + along, x + 1 - along
    if y1 >= rast.shape[1] or x1 >= rast.shape[2]:
        return
    one, two = rast[b, y, x], rast[b, y1, x1]
    if one[3] == two[3]:
        return
    line, here = f64(y) + HALF, f64(x) + HALF
    if along == 1:
        line, here = here, line
    f, origin, direction = int(two[3]) - 1, here + ONE, -ONE
    if two[3] == wp.float32(0.0) or (one[3] > wp.float32(0.0) and one[2] <= two[2]):  # the first pixel is nearer
        f, origin, direction = int(one[3]) - 1, here, ONE
    hit = _first_silhouette(screen, triangles, opposite, facing, b, f, line, origin, direction, along)
    if hit < 0:
        return
    i = triangles[hit // 3]
    p, q = screen[b, i[(hit % 3 + 1) % 3]], screen[b, i[(hit % 3 + 2) % 3]]
    steep = wp.abs(q[1] - p[1]) >= wp.abs(q[0] - p[0])
    if steep != (along == 0):
        return
    weight = _crossing(p, q, line, along, 1 - along) - here - HALF
    if weight >= -HALF and weight < HALF:
        edges[b, along, y, x] = hit
        weights[b, along, y, x] = wp.float32(weight)


@wp.func
def _blended(colour: wp.array4d(dtype=wp.float32), b: int, y: int, x: int, v: int, u: int, k: int, weight: wp.float32):
    """Return the share of a neighbour [v, u] that a pixel takes where the edge cuts into it: weight < 0."""
    if weight < wp.float32(0.0):
        return -weight * (colour[b, v, u, k] - colour[b, y, x, k])
    return wp.float32(0.0)


@wp.kernel
def _blend(
    colour: wp.array4d(dtype=wp.float32), weights: wp.array4d(dtype=wp.float32), out: wp.array4d(dtype=wp.float32)
):
    b, y, x, k = wp.tid()
    value = colour[b, y, x, k]
    value += _blended(colour, b, y, x, y, wp.min(x + 1, colour.shape[2] - 1), k, weights[b, 0, y, x])
    value += _blended(colour, b, y, x, wp.min(y + 1, colour.shape[1] - 1), x, k, weights[b, 1, y, x])
    if x > 0:
        value += _blended(colour, b, y, x, y, x - 1, k, -weights[b, 0, y, x - 1])
    if y > 0:
        value += _blended(colour, b, y, x, y - 1, x, k, -weights[b, 1, y - 1, x])
    out[b, y, x, k] = value


def antialias_forward(colour: Tensor, rast: Tensor, clip: Tensor, triangles: Tensor, opposite: Tensor):
    """Return antialiased colour [B, H, W, C] and the crossings (triangles, edges, weights) for the backward."""
    batch, height, width, _ = colour.shape
    device = colour.device
    screen = project(clip, height, width)
    facing = torch.empty(batch, len(triangles), dtype=torch.int32, device=device)
    launch(_facing, tuple(facing.shape), (screen, triangles, facing))
    edges = torch.empty(batch, 2, height, width, dtype=torch.int32, device=device)
    weights = torch.empty(edges.shape, dtype=torch.float32, device=device)
    launch(_walk_pairs, tuple(edges.shape), (screen, triangles, opposite, facing, rast, edges, weights))
    out = torch.empty_like(colour)
    launch(_blend, tuple(colour.shape), (colour, weights, out))
    return out, (triangles, edges, weights)


@wp.func
def _returned(grad: wp.array4d(dtype=wp.float32), b: int, y: int, x: int, v: int, u: int, k: int, weight: wp.float32):
    """The gradient of a pixel's colour through its pair with the neighbour [v, u]; weight > 0 cuts into that one."""
    if weight > wp.float32(0.0):
        return weight * grad[b, v, u, k]
    return weight * grad[b, y, x, k]


@wp.kernel
def _blend_back(
    grad: wp.array4d(dtype=wp.float32), weights: wp.array4d(dtype=wp.float32), out: wp.array4d(dtype=wp.float32)
):
    b, y, x, k = wp.tid()
    value = grad[b, y, x, k]
    value += _returned(grad, b, y, x, y, wp.min(x + 1, grad.shape[2] - 1), k, weights[b, 0, y, x])
    value += _returned(grad, b, y, x, wp.min(y + 1, grad.shape[1] - 1), x, k, weights[b, 1, y, x])
    if x > 0:
        value += _returned(grad, b, y, x, y, x - 1, k, -weights[b, 0, y, x - 1])
    if y > 0:
        value += _returned(grad, b, y, x, y - 1, x, k, -weights[b, 1, y - 1, x])
    out[b, y, x, k] = value


@wp.kernel
def _slide_back(
    clip: wp.array2d(dtype=wp.vec4f),
    triangles: wp.array(dtype=wp.vec3i),
    edges: wp.array4d(dtype=wp.int32),
    weights: wp.array4d(dtype=wp.float32),
    colour: wp.array4d(dtype=wp.float32),
    grad: wp.array4d(dtype=wp.float32),
    peak: wp.array(dtype=wp.float32),
    total: wp.array(dtype=wp.int64),
    unit: wp.float64,
):
    b, along, y, x = wp.tid()
    e = edges[b, along, y, x]
    if e < 0:
        return
    y1, x1 = y + along, x + 1 - along
    to_y, to_x = y, x
    if weights[b, along, y, x] > wp.float32(0.0):
        to_y, to_x = y1, x1
    slide = f64(0.0)  # the gradient of where the edge crosses, in pixels
    for k in range(colour.shape[3]):
        slide += f64(grad[b, to_y, to_x, k]) * (f64(colour[b, y, x, k]) - f64(colour[b, y1, x1, k]))
    if slide == ZERO:
        return
    height, width = f64(colour.shape[1]), f64(colour.shape[2])
    i, j = triangles[e // 3][(e % 3 + 1) % 3], triangles[e // 3][(e % 3 + 2) % 3]
    ci, cj = clip[b, i], clip[b, j]
    xi, yi, wi = f64(ci[0]), f64(ci[1]), f64(ci[3])
    xj, yj, wj = f64(cj[0]), f64(cj[1]), f64(cj[3])
    sxi, syi = (xi / wi * HALF + HALF) * width, (HALF - yi / wi * HALF) * height
    sxj, syj = (xj / wj * HALF + HALF) * width, (HALF - yj / wj * HALF) * height
    gx, gy, share = ZERO, ZERO, ZERO
    if along == 0:
        gx, gy = slide, -slide * ((sxj - sxi) / (syj - syi))
        share = (f64(y) + HALF - syi) / (syj - syi)
    else:
        gx, gy = -slide * ((syj - syi) / (sxj - sxi)), slide
        share = (f64(x) + HALF - sxi) / (sxj - sxi)
    gx, gy = gx * HALF * width, -gy * HALF * height
    rest = ONE - share
    row = 4 * (b * clip.shape[1] + i)
    cuda_sums.add(peak, total, unit, row, rest * gx / wi)
    cuda_sums.add(peak, total, unit, row + 1, rest * gy / wi)
    cuda_sums.add(peak, total, unit, row + 3, -rest * (gx * xi + gy * yi) / (wi * wi))
    row = 4 * (b * clip.shape[1] + j)
    cuda_sums.add(peak, total, unit, row, share * gx / wj)
    cuda_sums.add(peak, total, unit, row + 1, share * gy / wj)
    cuda_sums.add(peak, total, unit, row + 3, -share * (gx * xj + gy * yj) / (wj * wj))


def antialias_backward(colour: Tensor, clip: Tensor, crossings: tuple, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients of colour [B, H, W, C] and clip [B, V, 4]."""
    triangles, edges, weights = crossings
    grad_colour = torch.empty_like(colour)
    launch(_blend_back, tuple(colour.shape), (grad, weights, grad_colour))

    def run(peak: Tensor, total: Tensor, unit: float) -> None:
        arguments = (clip, triangles, edges, weights, colour, grad, peak, total, unit)
        launch(_slide_back, tuple(edges.shape), arguments)

    terms = 4 * colour.shape[1] * colour.shape[2]
    return grad_colour, cuda_sums.collect(clip.shape, terms, colour.device, run).float()
