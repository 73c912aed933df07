"""numba kernels behind antialias and edge_topology of stages/kernels/raster.py.

The antialiasing is driven by the silhouette edges (a few thousand pixel crossings a view), not by the pixel pairs:
every crossing of an edge with the segment between two pixel centres is kept if a walk over the surface, from the
nearer pixel's triangle along the segment, meets that edge as its first silhouette.

Half-edge 3 f + k lies opposite corner k of triangle f, from corner k + 1 to corner k + 2.
"""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit
from stages.kernels.cpu.raster import _project
from stages.kernels.cpu.threads import each

STEPS_MAX = 64  # triangles walked over within one pixel
BACK, FRONT, UNDRAWABLE = 0, 1, 2


@njit(cache=True, nogil=True)
def edge_topology(triangles, vertices):
    """Opposite half-edge of every half-edge [F, 3] int32, -1 without exactly one; radix sort by both ends."""
    count = triangles.shape[0] * 3
    low, high = np.empty(count, np.int32), np.empty(count, np.int32)
    for f in range(triangles.shape[0]):
        for k in range(3):
            i, j = triangles[f, (k + 1) % 3], triangles[f, (k + 2) % 3]
            low[3 * f + k], high[3 * f + k] = min(i, j), max(i, j)
    order = np.arange(count).astype(np.int32)
    for key in (high, low):
        start = np.zeros(vertices + 1, np.int64)
        for e in range(count):
            start[key[e] + 1] += 1
        for v in range(vertices):
            start[v + 1] += start[v]
        sorted_edges = np.empty(count, np.int32)
        for n in range(count):
            e = order[n]
            sorted_edges[start[key[e]]] = e
            start[key[e]] += 1
        order = sorted_edges
    opposite = np.full((triangles.shape[0], 3), -1, np.int32)
    n = 0
    while n < count:
        m = n + 1
        while m < count and low[order[m]] == low[order[n]] and high[order[m]] == high[order[n]]:
            m += 1
        if m == n + 2 and order[n] // 3 != order[n + 1] // 3:
            e, o = order[n], order[n + 1]
            opposite[e // 3, e % 3], opposite[o // 3, o % 3] = o, e
        n = m
    return opposite


@njit(cache=True, nogil=True)
def _facing(screen, triangles, out):
    for f in range(triangles.shape[0]):
        a, b, c = triangles[f, 0], triangles[f, 1], triangles[f, 2]
        z = screen[a, 2] + screen[b, 2] + screen[c, 2]
        ax, ay = screen[a, 0], screen[a, 1]
        area = (screen[b, 0] - ax) * (screen[c, 1] - ay) - (screen[c, 0] - ax) * (screen[b, 1] - ay)
        out[f] = UNDRAWABLE if z != z else (FRONT if area > 0.0 else BACK)


@njit(cache=True, nogil=True, inline="always")
def _silhouette(triangles, opposite, facing, f, k):
    """Whether the surface ends or turns away at half-edge k of f: the two triangles lie on one side of the edge."""
    o = opposite[f, k]
    if o < 0 or facing[o // 3] == UNDRAWABLE:
        return True
    against = triangles[f, (k + 1) % 3] != triangles[o // 3, (o % 3 + 1) % 3]
    return (facing[f] != facing[o // 3]) == against


@njit(cache=True, nogil=True, inline="always")
def _crossing(screen, i, j, line, along, across):
    """Return where, along one screen axis, the line through vertices i and j meets `line` on the other."""
    slope = (screen[j, along] - screen[i, along]) / (screen[j, across] - screen[i, across])
    return screen[i, along] + (line - screen[i, across]) * slope


@njit(cache=True, nogil=True)
def _first_silhouette(screen, triangles, opposite, facing, f, line, here, direction, along, across):
    """First silhouette half-edge met from triangle f along +-`along` within a pixel of `here`, or -1."""
    entry = -1
    for _ in range(STEPS_MAX):
        best, best_t = -1, -np.inf
        for k in range(3):
            i, j = triangles[f, (k + 1) % 3], triangles[f, (k + 2) % 3]
            if k == entry or (screen[i, across] > line) == (screen[j, across] > line):
                continue
            t = direction * (_crossing(screen, i, j, line, along, across) - here)
            if t > best_t:
                best, best_t = k, t
        if best < 0 or best_t > 1.0:
            return -1
        if _silhouette(triangles, opposite, facing, f, best):
            return 3 * f + best
        o = opposite[f, best]
        f, entry = o // 3, o % 3
    return -1


@njit(cache=True, nogil=True)
def _walk_edges(screen, triangles, opposite, facing, rast, pixels, ends, weights):
    """Kept crossings of one view; with empty output arrays, only an upper bound of their number."""
    height, width = rast.shape[0], rast.shape[1]
    count = 0
    for f in range(triangles.shape[0]):
        if facing[f] == UNDRAWABLE:
            continue
        for k in range(3):
            o = opposite[f, k]
            if o >= 0 and o // 3 < f and facing[o // 3] != UNDRAWABLE:
                continue  # its other half came first
            if not _silhouette(triangles, opposite, facing, f, k):
                continue
            i, j = triangles[f, (k + 1) % 3], triangles[f, (k + 2) % 3]
            steep = abs(screen[j, 1] - screen[i, 1]) >= abs(screen[j, 0] - screen[i, 0])
            along, across = (0, 1) if steep else (1, 0)
            lines, length = (height, width) if steep else (width, height)
            low = min(max(min(screen[i, across], screen[j, across]), 0.0), np.float64(lines))
            high = min(max(max(screen[i, across], screen[j, across]), 0.0), np.float64(lines))
            first, last = np.int64(np.ceil(low - 0.5)), min(np.int64(np.ceil(high - 0.5)), lines)
            if len(pixels) == 0:
                count += max(last - first, 0)
                continue
            for n in range(first, last):
                line = n + 0.5
                at = _crossing(screen, i, j, line, along, across)
                if not (at >= 0.5 and at < length - 0.5):
                    continue
                m = np.int64(np.floor(at - 0.5))
                y0, x0 = (n, m) if steep else (m, n)
                y1, x1 = (n, m + 1) if steep else (m + 1, n)
                id0, id1 = np.int64(rast[y0, x0, 3]), np.int64(rast[y1, x1, 3])
                if id0 == id1:
                    continue
                if id1 == 0 or (id0 > 0 and rast[y0, x0, 2] <= rast[y1, x1, 2]):
                    near, here, direction = id0 - 1, m + 0.5, 1.0
                else:
                    near, here, direction = id1 - 1, m + 1.5, -1.0
                hit = _first_silhouette(screen, triangles, opposite, facing, near, line, here, direction, along, across)
                if hit == 3 * f + k or (hit >= 0 and hit == o):
                    pixels[count, 0], pixels[count, 1] = y0 * width + x0, y1 * width + x1
                    ends[count, 0], ends[count, 1] = i, j
                    weights[count] = at - (m + 1.0)
                    count += 1
    return count


@njit(cache=True, nogil=True)
def _prepare(b, clip, triangles, opposite, rast, screen, facing, counts):
    empty = np.empty((0, 2), np.int32)
    _project(clip[b], rast.shape[1], rast.shape[2], screen[b])
    _facing(screen[b], triangles, facing[b])
    counts[b] = _walk_edges(screen[b], triangles, opposite, facing[b], rast[b], empty, empty, np.empty(0, np.float64))


@njit(cache=True, nogil=True)
def _blend(colour, pixels, weights, out):
    """out += |weight| * (other - receiver) at the receiver: the second pixel where weight > 0, else the first."""
    for n in range(len(weights)):
        a = np.float32(abs(weights[n]))
        to, other = (pixels[n, 1], pixels[n, 0]) if weights[n] > 0.0 else (pixels[n, 0], pixels[n, 1])
        for k in range(colour.shape[1]):
            out[to, k] += a * (colour[other, k] - colour[to, k])


@njit(cache=True, nogil=True)
def _antialias(b, triangles, opposite, rast, screen, facing, colour, start, counts, pixels, ends, weights, out):
    s = slice(start[b], start[b] + counts[b])
    counts[b] = (
        _walk_edges(screen[b], triangles, opposite, facing[b], rast[b], pixels[s], ends[s], weights[s])
        if counts[b] > 0
        else 0
    )
    s = slice(start[b], start[b] + counts[b])
    _blend(colour[b], pixels[s], weights[s], out[b])


def antialias_forward(colour, rast, clip, triangles, opposite):
    """Return antialiased colour [B, H, W, C] and the crossings (start, counts, pixels, ends, weights)."""
    batch, height, width, channels = colour.shape
    screen = np.empty((batch, clip.shape[1], 3), np.float64)
    facing = np.empty((batch, len(triangles)), np.uint8)
    counts = np.zeros(batch, np.int64)
    each(batch, _prepare, clip, triangles, opposite, rast, screen, facing, counts)
    start = np.cumsum(counts) - counts
    total = int(counts.sum())
    pixels, ends, weights = np.empty((total, 2), np.int32), np.empty((total, 2), np.int32), np.empty(total, np.float64)
    flat = colour.reshape(batch, height * width, channels)
    out = flat.copy()
    crossings = (start, counts, pixels, ends, weights)
    each(batch, _antialias, triangles, opposite, rast, screen, facing, flat, *crossings, out)
    return out.reshape(colour.shape), crossings


@njit(cache=True, nogil=True)
def _unblend(clip, height, width, colour, grad, pixels, ends, weights, grad_colour, grad_clip):
    for n in range(len(weights)):
        a = np.float32(abs(weights[n]))
        p, q = pixels[n, 0], pixels[n, 1]
        to, other = (q, p) if weights[n] > 0.0 else (p, q)
        slide = 0.0  # the gradient of where the edge crosses, in pixels
        for k in range(colour.shape[1]):
            g = grad[to, k]
            grad_colour[other, k] += a * g
            grad_colour[to, k] -= a * g
            slide += np.float64(g) * (np.float64(colour[p, k]) - np.float64(colour[q, k]))
        if slide == 0.0:
            continue
        i, j = ends[n, 0], ends[n, 1]
        xi, yi, wi = np.float64(clip[i, 0]), np.float64(clip[i, 1]), np.float64(clip[i, 3])
        xj, yj, wj = np.float64(clip[j, 0]), np.float64(clip[j, 1]), np.float64(clip[j, 3])
        sxi, syi = (xi / wi * 0.5 + 0.5) * width, (0.5 - yi / wi * 0.5) * height
        sxj, syj = (xj / wj * 0.5 + 0.5) * width, (0.5 - yj / wj * 0.5) * height
        if q == p + 1 and width > 1:  # side by side; in an image one column wide, p + 1 is below
            slope = (sxj - sxi) / (syj - syi)
            share = (p // width + 0.5 - syi) / (syj - syi)
            gx, gy = slide, -slide * slope
        else:
            slope = (syj - syi) / (sxj - sxi)
            share = (p % width + 0.5 - sxi) / (sxj - sxi)
            gx, gy = -slide * slope, slide
        gx, gy = gx * 0.5 * width, -gy * 0.5 * height
        grad_clip[i, 0] += (1.0 - share) * gx / wi
        grad_clip[i, 1] += (1.0 - share) * gy / wi
        grad_clip[i, 3] -= (1.0 - share) * (gx * xi + gy * yi) / (wi * wi)
        grad_clip[j, 0] += share * gx / wj
        grad_clip[j, 1] += share * gy / wj
        grad_clip[j, 3] -= share * (gx * xj + gy * yj) / (wj * wj)


@njit(cache=True, nogil=True)
def _antialias_backward(
    b, clip, height, width, colour, grad, start, counts, pixels, ends, weights, grad_colour, grad_clip
):  # fmt: skip
    s = slice(start[b], start[b] + counts[b])
    _unblend(clip[b], height, width, colour[b], grad[b], pixels[s], ends[s], weights[s], grad_colour[b], grad_clip[b])


def antialias_backward(colour, clip, crossings, grad):
    """Return gradients of colour [B, H, W, C] and clip [B, V, 4]."""
    batch, height, width, channels = colour.shape
    flat = (batch, height * width, channels)
    grad_colour, grad_clip = grad.reshape(flat).copy(), np.zeros(clip.shape, np.float64)
    pictures = (colour.reshape(flat), grad.reshape(flat))
    each(batch, _antialias_backward, clip, height, width, *pictures, *crossings, grad_colour, grad_clip)
    return grad_colour.reshape(colour.shape), grad_clip.astype(np.float32)
