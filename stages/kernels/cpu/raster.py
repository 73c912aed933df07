"""numba kernels behind stages/kernels/raster.py: scanline z-buffer and interpolation, forward and backward.

Every kernel works on contiguous numpy arrays and splits its work by shape alone, never by thread count,
so the bytes that come out do not depend on how many threads there were.

Letters: B views, V vertices, F triangles, H rows, W columns, C channels. `screen` is [V, 3] float64:
x right and y down in pixels, and z/w. Edge functions are float64 and are evaluated from the same end for both
triangles at an edge, so they are exact negatives of each other and no pixel centre falls between two neighbours.
"""

from __future__ import annotations

import math

import numpy as np

from stages.kernels.cpu.jit import njit
from stages.kernels.cpu.threads import each
from stages.kernels.cpu.vectors import PIXELS, draw_pixels, hides, write_pixel
from stages.kernels.reference.raster import AREA_MIN, PIXELS_MAX, W_MIN

SHIFT = 6  # of a row to its band
BAND = 1 << SHIFT  # rows a task owns; 64 rows of 512 columns with depth and id stay in a 0.5 MB cache
PART = 1 << 13  # triangles that a task sorts into bands
AREA_SURE, DEPTH_SURE = 1e-3, 1e-6  # a depth within a triangle this large is the corners' least to this or better
PIXELS_PART = 1 << 15  # pixels that a task interpolates
REDUCED = 1 << 14  # vertices whose sums a task adds up


@njit(cache=True, nogil=True)
def _project(clip, height, width, screen):
    for v in range(clip.shape[0]):
        w = np.float64(clip[v, 3])
        x = y = z = math.nan
        if w > W_MIN:
            x = (np.float64(clip[v, 0]) / w * 0.5 + 0.5) * width
            y = (0.5 - np.float64(clip[v, 1]) / w * 0.5) * height
            z = np.float64(clip[v, 2]) / w
            if not (abs(x) < PIXELS_MAX and abs(y) < PIXELS_MAX):
                z = math.nan
        screen[v, 0], screen[v, 1], screen[v, 2] = x, y, z


@njit(cache=True, nogil=True)
def _find_rows(screen, triangles, first, last, height, width, rows):
    """First and end row of triangles first .. last, none where nothing is drawn, and 1 where one turns away."""
    for f in range(first, last):
        a, b, c = triangles[f, 0], triangles[f, 1], triangles[f, 2]
        x0, x1, x2, y0, y1, y2 = screen[a, 0], screen[b, 0], screen[c, 0], screen[a, 1], screen[b, 1], screen[c, 1]
        rows[f, 0] = rows[f, 1] = rows[f, 2] = 0
        z = screen[a, 2] + screen[b, 2] + screen[c, 2]
        if z != z:
            continue
        y_min, y_max = max(min(y0, y1, y2), 0.0), min(max(y0, y1, y2), np.float64(height))
        if max(x0, x1, x2) < 0.5 or min(x0, x1, x2) > width - 0.5 or y_max < 0.5 or y_min > height - 0.5:
            continue
        rows[f, 0] = np.int32(math.ceil(y_min - 0.5))
        rows[f, 1] = min(np.int32(math.floor(y_max - 0.5)) + 1, height)
        rows[f, 2] = (x1 - x0) * (y2 - y0) > (x2 - x0) * (y1 - y0)


@njit(cache=True, nogil=True)
def _edge(ax, ay, bx, by, sign):
    """Coefficients of A x + (B y + C), positive on one side of the line a-b; always taken from the same end."""
    swapped = (ax > bx) | ((ax == bx) & (ay > by))  # no branch: half of the edges are
    px, py = bx if swapped else ax, by if swapped else ay
    qx, qy = ax if swapped else bx, ay if swapped else by
    side = -sign if swapped else sign
    ea = -(qy - py)
    eb = qx - px
    ec = -(ea * px + eb * py)
    return side * ea, side * eb, side * ec


@njit(cache=True, nogil=True)
def _narrow(ea, er, lo, hi):
    """Columns [lo, hi) that can lie on the inner side of an edge in one row, a column to spare each side."""
    if ea == 0.0:
        return lo, hi if er >= 0.0 else lo
    cross = -er / ea - 0.5
    if ea > 0.0:
        if cross > lo:
            lo = np.int64(min(math.floor(cross) - 1.0, np.float64(hi))) if cross - 1.0 > lo else lo
    elif cross < hi:
        hi = np.int64(max(math.ceil(cross) + 2.0, np.float64(lo))) if cross + 2.0 < hi else hi
    return lo, hi


@njit(cache=True, nogil=True)
def _fill_band(screen, triangles, rows, order, away, y_lo, y_hi, width, depth, ids):
    """Draw the triangles `order` into rows y_lo .. y_hi; of those that turn `away`, on a closed body drawn after the
    others, most are hidden with all of their box, and testing that is quicker than drawing them."""
    for f in order:
        r0, r1 = max(rows[f, 0], y_lo), min(rows[f, 1], y_hi)
        a, b, c = triangles[f, 0], triangles[f, 1], triangles[f, 2]
        x0, y0, z0 = screen[a, 0], screen[a, 1], screen[a, 2]
        x1, y1, z1 = screen[b, 0], screen[b, 1], screen[b, 2]
        x2, y2, z2 = screen[c, 0], screen[c, 1], screen[c, 2]
        left = np.int64(math.ceil(max(min(x0, x1, x2), 0.0) - 0.5))
        right = np.int64(math.floor(min(max(x0, x1, x2), np.float64(width)) - 0.5)) + 1
        right = min(right, width)
        if left >= right:
            continue
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if not abs(area) > AREA_MIN:
            continue
        if away and right - left <= PIXELS and abs(area) > AREA_SURE:
            nearest, hidden = min(z0, z1, z2) - DEPTH_SURE, True
            for y in range(r0, r1):
                hidden &= hides(depth, (y - y_lo) * depth.shape[1] + left, right - left, nearest)
            if hidden:
                continue
        sign = 1.0 if area > 0.0 else -1.0
        inverse = 1.0 / abs(area)
        ea0, eb0, ec0 = _edge(x1, y1, x2, y2, sign)
        ea1, eb1, ec1 = _edge(x2, y2, x0, y0, sign)
        ea2, eb2, ec2 = _edge(x0, y0, x1, y1, sign)
        if right - left <= PIXELS:
            for y in range(r0, r1):
                py, at = y + 0.5, (y - y_lo) * depth.shape[1] + left
                edges = (ea0, eb0 * py + ec0, ea1, eb1 * py + ec1, ea2, eb2 * py + ec2)
                draw_pixels(depth, ids, at, left, right, f + 1, edges, z0, z1, z2, inverse)
            continue
        for y in range(r0, r1):
            py = y + 0.5
            er0, er1, er2 = eb0 * py + ec0, eb1 * py + ec1, eb2 * py + ec2
            lo, hi = _narrow(ea0, er0, left, right)
            lo, hi = _narrow(ea1, er1, lo, hi)
            lo, hi = _narrow(ea2, er2, lo, hi)
            edges = (ea0, er0, ea1, er1, ea2, er2)
            for x in range(lo, hi, PIXELS):
                at = (y - y_lo) * depth.shape[1] + x
                draw_pixels(depth, ids, at, x, right, f + 1, edges, z0, z1, z2, inverse)


@njit(cache=True, nogil=True, inline="always")
def _about_pixel(clip, a, b, c, fx, fy):
    """Clip x and y of the three corners with the pixel's ray moved to the origin: homogeneous, perspective-exact."""
    aw, bw, cw = np.float64(clip[a, 3]), np.float64(clip[b, 3]), np.float64(clip[c, 3])
    ax, ay = clip[a, 0] - fx * aw, clip[a, 1] - fy * aw
    bx, by = clip[b, 0] - fx * bw, clip[b, 1] - fy * bw
    cx, cy = clip[c, 0] - fx * cw, clip[c, 1] - fy * cw
    return ax, ay, bx, by, cx, cy


@njit(cache=True, nogil=True)
def _resolve_band(clip, triangles, y_lo, height, width, depth, ids, rast):
    across = 2.0 * (np.arange(width) + 0.5) / width - 1.0
    for y in range(depth.shape[0]):
        fy = 1.0 - 2.0 * (y + y_lo + 0.5) / height
        for x in range(width):
            number = ids[y, x]
            if number == 0:
                rast[y + y_lo, x, 0] = rast[y + y_lo, x, 1] = rast[y + y_lo, x, 2] = rast[y + y_lo, x, 3] = 0.0
                continue
            at = 4 * ((y + y_lo) * width + x)
            write_pixel(clip, triangles, number, across[x], fy, depth, y * depth.shape[1] + x, rast, at)


@njit(cache=True, nogil=True)
def _project_part(task, parts, clip, height, width, screen):
    b, part = task // parts, task % parts
    start, stop = part * clip.shape[1] // parts, (part + 1) * clip.shape[1] // parts
    _project(clip[b, start:stop], height, width, screen[b, start:stop])


@njit(cache=True, nogil=True)
def _count_part(task, parts, screen, triangles, height, width, rows, count):
    """Count [view, part, band and 2] the triangles of a part that touch each band, those that turn away apart."""
    b, part = task // parts, task % parts
    first, last = part * len(triangles) // parts, (part + 1) * len(triangles) // parts
    _find_rows(screen[b], triangles, first, last, height, width, rows[b])
    spans, bins = rows[b], count[b, part]
    for f in range(first, last):
        for band in range(spans[f, 0] >> SHIFT, (spans[f, 1] + BAND - 1) >> SHIFT):
            bins[2 * band + spans[f, 2]] += 1


@njit(cache=True, nogil=True)
def _sort_part(task, parts, rows, start, order):
    """Write their numbers into `order` from `start` on, which moves along."""
    b, part = task // parts, task % parts
    spans, to = rows[b], start[b, part]
    for f in range(part * len(spans) // parts, (part + 1) * len(spans) // parts):
        for band in range(spans[f, 0] >> SHIFT, (spans[f, 1] + BAND - 1) >> SHIFT):
            order[to[2 * band + spans[f, 2]]] = f
            to[2 * band + spans[f, 2]] += 1


@njit(cache=True, nogil=True)
def _raster_band(task, clip, screen, triangles, rows, order, first, rast):
    _, height, width, _ = rast.shape
    bands = (height + BAND - 1) // BAND
    b, band = task // bands, task % bands
    y_lo, y_hi = band * BAND, min((band + 1) * BAND, height)
    depth = np.full((y_hi - y_lo, width + PIXELS), np.inf, np.float64)
    ids = np.zeros((y_hi - y_lo, width + PIXELS), np.int32)
    for away in range(2):
        members = order[first[2 * task + away] : first[2 * task + away + 1]]
        _fill_band(screen[b], triangles, rows[b], members, away, y_lo, y_hi, width, depth, ids)
    _resolve_band(clip[b], triangles, y_lo, height, width, depth, ids, rast[b])


def rasterise_forward(clip, triangles, rast):
    """Fill rast [B, H, W, 4] from clip [B, V, 4] float32 and triangles [F, 3] int32."""
    batch, height, width, _ = rast.shape
    if not batch:
        return
    bands, parts = -(-height // BAND), max(1, len(triangles) // PART)
    screen = np.empty((batch, clip.shape[1], 3), np.float64)
    each(batch * parts, _project_part, parts, clip, height, width, screen)
    rows = np.empty((batch, len(triangles), 3), np.int32)
    count = np.zeros((batch, parts, 2 * bands), np.int64)
    each(batch * parts, _count_part, parts, screen, triangles, height, width, rows, count)
    of_band = count.transpose(0, 2, 1)
    ends = np.cumsum(of_band)
    start = (ends.reshape(of_band.shape) - of_band).transpose(0, 2, 1).copy()
    first = np.append(start[:, 0].ravel(), ends[-1])
    order = np.empty(ends[-1], np.int32)
    each(batch * parts, _sort_part, parts, rows, start, order)
    each(batch * bands, _raster_band, clip, screen, triangles, rows, order, first, rast)


def private_copies(owners: int, pixels: int) -> int:
    """Return how many accumulators a scatter gets, a multiple of the outputs it has; by shape alone."""
    return owners * max(1, -(-4 // owners)) if pixels >= 1 << 16 else owners


@njit(cache=True, nogil=True, inline="always")
def _share(task, tasks, batch, height):
    """Rows [start, stop) of the batch's stacked rows that belong to a task."""
    return task * batch * height // tasks, (task + 1) * batch * height // tasks


@njit(cache=True, nogil=True)
def _reduce(block, private, out):
    owners, vertices, channels = out.shape
    shares = private.shape[0] // max(owners, 1)
    for v in range(block * REDUCED, min(vertices, (block + 1) * REDUCED)):
        for o in range(owners):
            for k in range(channels):
                total = 0.0
                for p in range(o * shares, (o + 1) * shares):
                    total += private[p, v, k]
                out[o, v, k] = total


def sum_copies(private, owners: int):
    """Return sums [O, V, C] float32 of private [P, V, C] float64 in order, P / O of them each."""
    out = np.empty((owners, *private.shape[1:]), np.float32)
    each(-(-out.shape[1] // REDUCED), _reduce, private, out)
    return out


@njit(cache=True, nogil=True)
def _rasterise_backward(task, clip, triangles, rast, grad, private):
    batch, height, width, _ = rast.shape
    start, stop = _share(task, len(private), batch, height)
    out = private[task]
    for row in range(start, stop):
        b, y = row // height, row % height
        fy = 1.0 - 2.0 * (y + 0.5) / height
        for x in range(width):
            f = np.int64(rast[b, y, x, 3]) - 1
            gu, gv = np.float64(grad[b, y, x, 0]), np.float64(grad[b, y, x, 1])
            if f < 0 or (gu == 0.0 and gv == 0.0):
                continue
            fx = 2.0 * (x + 0.5) / width - 1.0
            i, j, k = triangles[f, 0], triangles[f, 1], triangles[f, 2]
            ax, ay, bx, by, cx, cy = _about_pixel(clip[b], i, j, k, fx, fy)
            d0, d1, d2 = bx * cy - by * cx, cx * ay - cy * ax, ax * by - ay * bx
            scale = 1.0 / (d0 + d1 + d2)
            mean = (gu * d0 + gv * d1) * scale
            h0, h1, h2 = (gu - mean) * scale, (gv - mean) * scale, -mean * scale
            gax, gay = h2 * by - h1 * cy, h1 * cx - h2 * bx
            gbx, gby = h0 * cy - h2 * ay, h2 * ax - h0 * cx
            gcx, gcy = h1 * ay - h0 * by, h0 * bx - h1 * ax
            out[i, 0] += gax
            out[i, 1] += gay
            out[i, 3] -= fx * gax + fy * gay
            out[j, 0] += gbx
            out[j, 1] += gby
            out[j, 3] -= fx * gbx + fy * gby
            out[k, 0] += gcx
            out[k, 1] += gcy
            out[k, 3] -= fx * gcx + fy * gcy


def rasterise_backward(clip, triangles, rast, grad):
    """Gradient [B, V, 4] of clip from that of rast [B, H, W, 4], of which u and v count."""
    copies = private_copies(clip.shape[0], rast.size // 4)
    private = np.zeros((copies, *clip.shape[1:]), np.float64)
    each(copies, _rasterise_backward, clip, triangles, rast, grad, private)
    return sum_copies(private, len(clip))


@njit(cache=True, nogil=True)
def _interpolate(task, parts, attributes, rast, triangles, out):
    owner, part = task // parts, task % parts
    pixels, channels = rast.shape[1], attributes.shape[2]
    source, picture, to = attributes[owner], rast[owner], out[owner]
    for q in range(part * pixels // parts, (part + 1) * pixels // parts):
        f = np.int64(picture[q, 3]) - 1
        if f < 0:
            for k in range(channels):
                to[q, k] = 0.0
            continue
        u, v = picture[q, 0], picture[q, 1]
        w = np.float32(1.0) - u - v
        a, b, c = triangles[f, 0], triangles[f, 1], triangles[f, 2]
        for k in range(channels):
            to[q, k] = u * source[a, k] + v * source[b, k] + w * source[c, k]


def _by_owner(attributes, picture):
    """A picture [B, H, W, K] as [A, B H W / A, K]: pixels behind one another, for each owner A of attributes."""
    owners, channels = attributes.shape[0], picture.shape[-1]
    return picture.reshape(owners, picture.size // max(owners * channels, 1), channels)


def interpolate_forward(attributes, rast, triangles, out):
    """Fill out [B, H, W, C] from attributes [1 or B, V, C]."""
    picture, owners = _by_owner(attributes, rast), attributes.shape[0]
    parts = -(-picture.shape[1] // PIXELS_PART)
    each(owners * parts, _interpolate, parts, attributes, picture, triangles, _by_owner(attributes, out))


@njit(cache=True, nogil=True)
def _interpolate_backward(task, parts, attributes, rast, triangles, grad, private, grad_rast):
    owner, part = task // parts, task % parts
    pixels, channels = rast.shape[1], attributes.shape[2]
    source, picture, up, back = attributes[owner], rast[owner], grad[owner], grad_rast[owner]
    out = private[task]
    for q in range(part * pixels // parts, (part + 1) * pixels // parts):
        back[q, 0] = back[q, 1] = back[q, 2] = back[q, 3] = 0.0
        f = np.int64(picture[q, 3]) - 1
        if f < 0:
            continue
        u, v = picture[q, 0], picture[q, 1]
        w = np.float32(1.0) - u - v
        a, b, c = triangles[f, 0], triangles[f, 1], triangles[f, 2]
        gu = gv = 0.0
        for k in range(channels):
            g = up[q, k]
            out[a, k] += u * g
            out[b, k] += v * g
            out[c, k] += w * g
            gu += g * (source[a, k] - source[c, k])
            gv += g * (source[b, k] - source[c, k])
        back[q, 0], back[q, 1] = gu, gv


def interpolate_backward(attributes, rast, triangles, grad):
    """Return gradients of attributes [1 or B, V, C] and of rast [B, H, W, 4]."""
    owners = attributes.shape[0]
    copies = private_copies(owners, rast.size // 4)
    private = np.zeros((copies, *attributes.shape[1:]), np.float64)
    grad_rast = np.empty(rast.shape, np.float32)
    pictures = (_by_owner(attributes, rast), triangles, _by_owner(attributes, grad))
    parts = copies // max(owners, 1)
    each(copies, _interpolate_backward, parts, attributes, *pictures, private, _by_owner(attributes, grad_rast))
    return sum_copies(private, owners), grad_rast
