"""numba kernels behind stages/kernels/grids.py, one ray at a time; definitions in reference/grids.py."""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit
from stages.kernels.cpu.threads import each
from stages.kernels.reference.grids import CHANNELS, CLEAR, DENSITY, EXTENT, FAINTEST

BLOCK = 4  # cells a side of what is skipped where it is empty
FAST = {"contract", "arcp", "nsz", "reassoc"}  # what leaves nan and infinity as they are


@njit(cache=True, nogil=True, inline="always")
def _span(index, placement, origin, direction):
    """Entry and exit of the union of a ray's spheres; the exit is not beyond the entry where it hits none."""
    first, last = np.float32(np.inf), np.float32(-np.inf)
    for k in range(len(index)):
        if index[k] < 0:
            continue
        along, square = np.float32(0), np.float32(0)
        for a in range(3):
            offset = origin[a] - placement[k, a + 1]
            along += offset * direction[a]
            square += offset * offset
        radius = np.float32(EXTENT) * placement[k, 0]
        inside = along * along - square + radius * radius
        if inside > 0:
            half = np.sqrt(inside)
            leave = max(-along + half, np.float32(0))
            enter = max(-along - half, np.float32(0))
            if leave > enter:
                first, last = min(first, enter), max(last, leave)
    return first, last


@njit(cache=True, nogil=True)
def _blocks(grids):
    """Return which blocks [M, Q, Q, Q] have a cell that is not empty among all that samples in them can touch."""
    size = grids.shape[1]
    side = (size + BLOCK - 1) // BLOCK
    blocks = np.zeros((len(grids), side, side, side), np.bool_)
    for m in range(len(grids)):
        for x in range(size):
            for y in range(size):
                for z in range(size):
                    if grids[m, x, y, z, 0] < np.float32(FAINTEST):
                        continue
                    for i in range(max(x - 1, 0) // BLOCK, x // BLOCK + 1):
                        for j in range(max(y - 1, 0) // BLOCK, y // BLOCK + 1):
                            for k in range(max(z - 1, 0) // BLOCK, z // BLOCK + 1):
                                blocks[m, i, j, k] = True
    return blocks


@njit(cache=True, nogil=True, inline="always", fastmath=FAST)
def _vacant(blocks, size, x, y, z, direction, s):
    """World length along a ray until it leaves the empty block of a point in a grid's own coordinates; 0 in any other.

    s: the grid's own lengths to a world length.
    """
    extent, half = np.float32(EXTENT), np.float32(0.5)
    if not x * x + y * y + z * z < extent * extent:
        return np.float32(0)
    scale, last = np.float32(0.5 * size / EXTENT), blocks.shape[0] - 1
    px, py, pz = (x + extent) * scale - half, (y + extent) * scale - half, (z + extent) * scale - half
    i, j, k = min(int(px) // BLOCK, last), min(int(py) // BLOCK, last), min(int(pz) // BLOCK, last)
    if blocks[i, j, k]:
        return np.float32(0)
    length = np.float32(2 * BLOCK * EXTENT)
    for p, block, towards in ((px, i, direction[0]), (py, j, direction[1]), (pz, k, direction[2])):
        speed = towards * scale * s
        if abs(speed) > np.float32(1e-6):
            edge = np.float32(BLOCK * (block + 1)) if speed > 0 else np.float32(BLOCK * block)
            length = min(length, (edge - p) / speed)
    return max(length, np.float32(1e-6))


@njit(cache=True, nogil=True, inline="always")
def _skip_count(objects, empty, length):
    """How many of a ray's next samples lie in the empty length too; none where a second object may be there."""
    for k in range(1, len(objects)):
        if objects[k] >= 0:
            return 0
    return max(int(np.ceil(empty / length)) - 1, 0)


@njit(cache=True, nogil=True, inline="always", fastmath=FAST)
def _gather(grid, x, y, z, out):
    """Trilinear cell values at a point in the grid's own coordinates, edges repeated; False outside its ball."""
    extent, size = np.float32(EXTENT), grid.shape[0]
    if not x * x + y * y + z * z < extent * extent:
        return False
    scale, last = np.float32(0.5 * size / EXTENT), size - 1
    half = np.float32(0.5)
    px, py, pz = (x + extent) * scale - half, (y + extent) * scale - half, (z + extent) * scale - half
    fx, fy, fz = np.floor(px), np.floor(py), np.floor(pz)
    tx, ty, tz = px - fx, py - fy, pz - fz
    ix, iy, iz = int(fx), int(fy), int(fz)
    x0, x1 = max(ix, 0), min(ix + 1, last)
    y0, y1 = max(iy, 0), min(iy + 1, last)
    z0, z1 = max(iz, 0), min(iz + 1, last)
    one = np.float32(1)
    a, b = (one - tx) * (one - ty), (one - tx) * ty
    c, d = tx * (one - ty), tx * ty
    w0, w1, w2, w3 = a * (one - tz), a * tz, b * (one - tz), b * tz
    w4, w5, w6, w7 = c * (one - tz), c * tz, d * (one - tz), d * tz
    for k in range(CHANNELS):
        out[k] = (
            w0 * grid[x0, y0, z0, k]
            + w1 * grid[x0, y0, z1, k]
            + w2 * grid[x0, y1, z0, k]
            + w3 * grid[x0, y1, z1, k]
            + w4 * grid[x1, y0, z0, k]
            + w5 * grid[x1, y0, z1, k]
            + w6 * grid[x1, y1, z0, k]
            + w7 * grid[x1, y1, z1, k]
        )
    return True


@njit(cache=True, nogil=True, inline="always", fastmath=FAST)
def _scatter(grad, x, y, z, row):
    """Transpose of _gather: adds a row times the corners' weights."""
    extent, size = np.float32(EXTENT), grad.shape[0]
    scale, last = np.float32(0.5 * size / EXTENT), size - 1
    half, one = np.float32(0.5), np.float32(1)
    px, py, pz = (x + extent) * scale - half, (y + extent) * scale - half, (z + extent) * scale - half
    fx, fy, fz = np.floor(px), np.floor(py), np.floor(pz)
    tx, ty, tz = px - fx, py - fy, pz - fz
    ix, iy, iz = int(fx), int(fy), int(fz)
    for i in range(2):
        gx, wx = (min(ix + 1, last), tx) if i else (max(ix, 0), one - tx)
        for j in range(2):
            gy, wy = (min(iy + 1, last), wx * ty) if j else (max(iy, 0), wx * (one - ty))
            for m in range(2):
                gz, w = (min(iz + 1, last), wy * tz) if m else (max(iz, 0), wy * (one - tz))
                for k in range(CHANNELS):
                    grad[gx, gy, gz, k] += w * row[k]


@njit(cache=True, nogil=True, inline="always")
def _density(raw):
    zero, one = np.float32(0), np.float32(1)
    if raw < np.float32(FAINTEST):
        return zero
    return np.exp(raw) if raw < zero else one + raw


@njit(cache=True, nogil=True, fastmath=FAST)
def _forward(view, grids, blocks, index, placement, origins, directions, steps, jitter, out):
    """One view's rays; out [B, R, 8]: albedo, normal, opacity, depth."""
    one, zero = np.float32(1), np.float32(0)
    place, objects = placement[view], index[view]
    scale = np.float32(np.inf)
    for k in range(len(objects)):
        if objects[k] >= 0:
            scale = min(scale, place[k, 0])
    length = np.float32(2 * EXTENT / steps) * scale
    cell, total = np.zeros(CHANNELS, np.float32), np.zeros(CHANNELS, np.float32)
    for r in range(origins.shape[1]):
        o, v = origins[view, r], directions[view, r]
        for c in range(CHANNELS):
            out[view, r, c] = zero
        first, last = _span(objects, place, o, v)
        if not last > first:
            continue
        light, d = one, 0
        while light >= np.float32(CLEAR):
            t = first + (np.float32(d) + jitter[view, r]) * length
            d += 1
            if not t < last:
                break
            density = zero
            for c in range(CHANNELS):
                total[c] = zero
            for k in range(len(objects)):
                if objects[k] < 0:
                    continue
                s = one / place[k, 0]
                x, y = (o[0] + t * v[0] - place[k, 1]) * s, (o[1] + t * v[1] - place[k, 2]) * s
                z = (o[2] + t * v[2] - place[k, 3]) * s
                empty = _vacant(blocks[objects[k]], grids.shape[1], x, y, z, v, s)
                if empty > zero:
                    d += _skip_count(objects, empty, length)
                elif _gather(grids[objects[k]], x, y, z, cell):
                    object_density = _density(cell[0]) * s
                    density += object_density
                    for c in range(CHANNELS):
                        total[c] += object_density * cell[c]
            if not density > zero:
                continue
            rest = np.exp(-np.float32(DENSITY) * length * density)
            weight = light * (one - rest)
            light *= rest
            share = weight / density
            for c in range(6):
                out[view, r, c] += share * total[c + 1]
            out[view, r, 6] += weight
            out[view, r, 7] += weight * t


@njit(cache=True, nogil=True, fastmath=FAST)
def _backward(grids, blocks, index, placement, origins, directions, steps, jitter, g_out, g_grids):
    """All views one after another, since several write into one grid."""
    one, zero = np.float32(1), np.float32(0)
    many = index.shape[1]
    most = steps * 8
    cells = np.zeros((most, many, CHANNELS), np.float32)
    object_densities = np.zeros((most, many), np.float32)
    densities, rests = np.zeros(most, np.float32), np.zeros(most, np.float32)
    lights, gains, times = np.zeros(most, np.float32), np.zeros(most, np.float32), np.zeros(most, np.float32)
    row = np.zeros(CHANNELS, np.float32)
    for view in range(len(origins)):
        place, objects = placement[view], index[view]
        scale = np.float32(np.inf)
        for k in range(many):
            if objects[k] >= 0:
                scale = min(scale, place[k, 0])
        length = np.float32(2 * EXTENT / steps) * scale
        depth = np.float32(DENSITY) * length
        for r in range(origins.shape[1]):
            o, v, g = origins[view, r], directions[view, r], g_out[view, r]
            first, last = _span(objects, place, o, v)
            if not last > first:
                continue
            light, d, count = one, 0, 0
            while light >= np.float32(CLEAR) and count < most:
                t = first + (np.float32(d) + jitter[view, r]) * length
                d += 1
                if not t < last:
                    break
                density = zero
                for k in range(many):
                    object_densities[count, k] = zero
                    if objects[k] < 0:
                        continue
                    s = one / place[k, 0]
                    x, y = (o[0] + t * v[0] - place[k, 1]) * s, (o[1] + t * v[1] - place[k, 2]) * s
                    z = (o[2] + t * v[2] - place[k, 3]) * s
                    empty = _vacant(blocks[objects[k]], grids.shape[1], x, y, z, v, s)
                    if empty > zero:
                        d += _skip_count(objects, empty, length)
                    elif _gather(grids[objects[k]], x, y, z, cells[count, k]):
                        object_densities[count, k] = _density(cells[count, k, 0]) * s
                        density += object_densities[count, k]
                if not density > zero:
                    continue
                gain = zero
                for k in range(many):
                    if object_densities[count, k] > zero:
                        for c in range(6):
                            gain += object_densities[count, k] * g[c] * cells[count, k, c + 1]
                rest = np.exp(-depth * density)
                times[count], densities[count], rests[count], lights[count] = t, density, rest, light
                gains[count] = gain / density + g[6] + g[7] * t  # d L / d weight
                light *= rest
                count += 1
            behind = zero
            for i in range(count - 1, -1, -1):
                after = lights[i] * rests[i]
                weight = lights[i] - after
                g_density = depth * (after * gains[i] - behind)
                behind += weight * gains[i]
                for k in range(many):
                    if not object_densities[i, k] > zero:
                        continue
                    share = weight * object_densities[i, k] / densities[i]
                    object_gain = g[6] + g[7] * times[i]
                    for c in range(6):
                        row[c + 1] = share * g[c]
                        object_gain += g[c] * cells[i, k, c + 1]
                    slope = object_densities[i, k] if cells[i, k, 0] < zero else one / place[k, 0]
                    row[0] = slope * (g_density + weight / densities[i] * (object_gain - gains[i]))
                    row[7] = zero
                    s, t = one / place[k, 0], times[i]
                    x, y = (o[0] + t * v[0] - place[k, 1]) * s, (o[1] + t * v[1] - place[k, 2]) * s
                    _scatter(g_grids[objects[k]], x, y, (o[2] + t * v[2] - place[k, 3]) * s, row)


def forward(grids, index, placement, origins, directions, steps, jitter) -> np.ndarray:
    """out [B, R, 8] of grids.py."""
    out = np.empty((*origins.shape[:2], CHANNELS), np.float32)
    each(len(origins), _forward, grids, _blocks(grids), index, placement, origins, directions, steps, jitter, out)
    return out


def backward(grids, index, placement, origins, directions, steps, jitter, g_out) -> np.ndarray:
    """Gradient in the grids."""
    g_grids = np.zeros_like(grids)
    _backward(grids, _blocks(grids), index, placement, origins, directions, steps, jitter, g_out, g_grids)
    return g_grids
