"""numba kernels behind stages/kernels/band.py; functions as in reference/band.py, on numpy arrays.

Ids are sorted, and adding a constant keeps them sorted, so a neighbour search over the whole band is one merge. Sets of
vertices are marked in a field of bits, one for every place of the padded cube; its pages exist where a bit is set.
Large results are numpy's own allocations, which ask the system for huge pages (numba's do not): a third of the time.
"""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit
from stages.kernels.reference.band import DIRECTIONS, MOVES, lengths, shifts, side_of

_MOVES = np.array(MOVES, dtype=np.int64)
_DIRECTIONS = len(DIRECTIONS)
_BITS = np.array([bin(mask).count("1") for mask in range(1 << _DIRECTIONS)], dtype=np.int32)


@njit(cache=True, nogil=True)
def _inside(i, side, last):
    """Whether a vertex has all three doubled coordinates in 0 .. last; i may be negative."""
    if i < 0:
        return False
    rest = i // side
    x = rest // side
    return i - rest * side <= last and rest - x * side <= last and x <= last


@njit(cache=True, nogil=True)
def _dilated(ids, steps, side, last, rings):
    """Sorted ids within `rings` of the given ones; steps: [K] offsets to the neighbours."""
    words = side * side * side // 64 + 1
    bits = np.zeros(8 * words, np.uint8)
    count = 0
    edge = np.empty(ids.shape[0], np.int64)  # the vertices of the last ring
    for i in ids:
        if not bits[i >> 3] >> (i & 7) & 1:
            bits[i >> 3] |= 1 << (i & 7)
            edge[count] = i
            count += 1
    total, width = count, count
    for ring in range(rings):
        following = np.empty(width * steps.shape[0] if ring + 1 < rings else 0, np.int64)
        count = 0
        for n in range(width):
            i = edge[n]
            rest = i // side
            x = rest // side
            y, z = rest - x * side, i - rest * side
            inner = 2 <= x <= last - 2 and 2 <= y <= last - 2 and 2 <= z <= last - 2
            for step in steps:
                j = i + step
                if (inner or _inside(j, side, last)) and not bits[j >> 3] >> (j & 7) & 1:
                    bits[j >> 3] |= 1 << (j & 7)
                    if ring + 1 < rings:
                        following[count] = j
                    count += 1
        edge, width = following, count
        total += count
    result = np.empty(total, np.int64)
    filled = bits.view(np.uint64)
    n = 0
    for w in range(words):
        if filled[w] == 0:
            continue
        for b in range(8 * w, 8 * w + 8):
            byte = bits[b]
            if byte:
                for k in range(8):
                    if byte >> k & 1:
                        result[n] = 8 * b + k
                        n += 1
    return result


@njit(cache=True, nogil=True)
def _neighbours(ids, steps, around, rim):
    """Fill around [N, 2 K] with the index of ids + steps[k] and of ids - steps[k], -1 where there is none."""
    n, directions = ids.shape[0], steps.shape[0]
    around[:] = -1
    at = np.zeros(directions, np.int64)
    for i in range(n):
        for k in range(directions):
            target = ids[i] + steps[k]
            j = at[k]
            while j < n and ids[j] < target:
                j += 1
            at[k] = j
            if j < n and ids[j] == target:
                around[i, k] = j
                around[j, directions + k] = i
    for i in range(n):
        missing = False
        for k in range(2 * directions):
            missing |= around[i, k] < 0
        rim[i] = missing


@njit(cache=True, nogil=True)
def _count(ids, around, area, bits):
    """Each vertex' first edge [N], the directions [N] in which it has one, as bits; edges, and centres (x odd).

    bits: how many are set in each number of K bits; area: offset of ids for a step along x.
    """
    n, directions = around.shape[0], around.shape[1] // 2
    first, ahead = np.empty(n, np.int32), np.empty(n, np.uint8)
    edges = centres = 0
    for i in range(n):
        mask = 0
        for k in range(directions):
            mask |= (around[i, k] >= 0) << k
        first[i], ahead[i] = edges, mask
        edges += bits[mask]
        centres += ids[i] // area & 1
    return first, ahead, edges, centres


@njit(cache=True, nogil=True)
def _edges(around, edges):
    """Fill edges [E, 2], from every vertex to those ahead of it."""
    e = 0
    for i in range(around.shape[0]):
        for k in range(around.shape[1] // 2):
            if around[i, k] >= 0:
                edges[e, 0], edges[e, 1] = i, around[i, k]
                e += 1


@njit(cache=True, nogil=True)
def _tetrahedra(ids, around, first, ahead, bits, moves, area, tets, tet_edges):
    """Fill tets [T, 4] and tet_edges [T, 6] around the axial edges that start at centres; returns T.

    moves [12, 6, 2]: as reference/band.py's. Four at a time share the next centre, and lie between the four corners of
    the face to it. first, ahead, bits, area: see _count.
    """
    n, directions = around.shape[0], around.shape[1] // 2
    column = np.where(moves[:, :, 1] > 0, moves[:, :, 0], directions + moves[:, :, 0])
    below = (1 << moves[:, :, 0]) - 1  # the directions before a move's
    corner, near, far = np.empty((3, 4), np.int32)
    t = 0
    for i in range(n):
        if not ids[i] // area & 1:
            continue
        for axis in range(0, 12, 4):
            centre = around[i, column[axis, 0]]
            if centre < 0:
                continue
            axial = first[i] + bits[ahead[i] & below[axis, 0]]
            for k in range(4):
                p = axis + k
                c = around[i, column[p, 1]]
                corner[k] = c
                if c >= 0:
                    low = i if moves[p, 1, 1] > 0 else c
                    near[k] = first[low] + bits[ahead[low] & below[p, 1]]
                    low = centre if moves[p, 3, 1] > 0 else c
                    far[k] = first[low] + bits[ahead[low] & below[p, 3]]
            for k in range(4):
                p, m = axis + k, (k + 1) & 3
                if corner[k] >= 0 and corner[m] >= 0:
                    low = corner[k] if moves[p, 5, 1] > 0 else corner[m]
                    tets[t, 0], tets[t, 1], tets[t, 2], tets[t, 3] = i, centre, corner[k], corner[m]
                    tet_edges[t, 0], tet_edges[t, 1], tet_edges[t, 2] = axial, near[k], near[m]
                    tet_edges[t, 3], tet_edges[t, 4] = far[k], far[m]
                    tet_edges[t, 5] = first[low] + bits[ahead[low] & below[p, 5]]
                    t += 1
    return t


@njit(cache=True, nogil=True)
def _apart(flags, around, directions):
    mark = np.zeros(flags.shape[0], np.bool_)
    for i in range(flags.shape[0]):
        for k in range(directions):
            j = around[i, k]
            if j >= 0 and flags[i] != flags[j]:
                mark[i] = True
                mark[j] = True
    return mark


@njit(cache=True, nogil=True)
def _places(ids, side, resolution):
    n, last = ids.shape[0], 2 * resolution
    positions, border = np.empty((n, 3), np.float32), np.empty(n, np.bool_)
    for i in range(n):
        rest = ids[i] // side
        x = rest // side
        y, z = rest - x * side, ids[i] - rest * side
        positions[i, 0], positions[i, 1], positions[i, 2] = x / resolution - 1, y / resolution - 1, z / resolution - 1
        border[i] = min(x, y, z) < 2 or max(x, y, z) > last - 2
    return positions, border


@njit(cache=True, nogil=True)
def _extended(values, known, around, steps, cell):
    values, known = values.copy(), known.copy()
    directions = steps.shape[0]
    todo = np.flatnonzero(~known)
    found = np.empty(todo.shape[0], np.float32)
    while todo.shape[0]:
        reached = np.zeros(todo.shape[0], np.bool_)
        for n in range(todo.shape[0]):
            best, sign = np.float32(np.inf), np.float32(1)
            for k in range(2 * directions):
                j = around[todo[n], k // 2 + (k & 1) * directions]
                if j >= 0 and known[j]:
                    away = abs(values[j]) + steps[k // 2]
                    if away < best:
                        best, sign = away, np.float32(-1) if values[j] < 0 else np.float32(1)
                        reached[n] = True
            found[n] = sign * best
        if not reached.any():
            for i in todo:
                values[i] = cell
            break
        for n in range(todo.shape[0]):
            if reached[n]:
                values[todo[n]] = found[n]
                known[todo[n]] = True
        todo = todo[~reached]
    return values


@njit(cache=True, nogil=True)
def _matched(ids, queries):
    index = np.full(queries.shape[0], -1, np.int64)
    j = 0
    for n in range(queries.shape[0]):
        while j < ids.shape[0] and ids[j] < queries[n]:
            j += 1
        if j == ids.shape[0]:
            break
        if ids[j] == queries[n]:
            index[n] = j
    return index


def dilated(ids, resolution: int, rings: int):
    """See reference/band.py."""
    steps = np.array(shifts(resolution), dtype=np.int64)
    return _dilated(ids, np.concatenate([steps, -steps]), side_of(resolution), 2 * resolution, rings)


def neighbours(ids, resolution: int):
    """See reference/band.py."""
    around, rim = np.empty((len(ids), 2 * _DIRECTIONS), np.int32), np.empty(len(ids), np.bool_)
    _neighbours(ids, np.array(shifts(resolution), dtype=np.int64), around, rim)
    return around, rim


def cells(ids, around, resolution: int):
    """See reference/band.py."""
    area = side_of(resolution) ** 2
    first, ahead, count, centres = _count(ids, around, area, _BITS)
    edges = np.empty((count, 2), np.int32)
    _edges(around, edges)
    capacity = centres * len(_MOVES)  # pages beyond what is used are never touched
    tets, tet_edges = np.empty((capacity, 4), np.int32), np.empty((capacity, 6), np.int32)
    count = _tetrahedra(ids, around, first, ahead, _BITS, _MOVES, area, tets, tet_edges)
    return edges, tets[:count], tet_edges[:count]


def apart(flags, around):
    """See reference/band.py."""
    return _apart(flags, around, _DIRECTIONS)


def places(ids, resolution: int):
    """See reference/band.py."""
    return _places(ids, side_of(resolution), resolution)


def extended(values, known, around, resolution: int):
    """See reference/band.py."""
    return _extended(values, known, around, np.array(lengths(resolution), dtype=np.float32), np.float32(2 / resolution))


def matched(ids, queries):
    """See reference/band.py."""
    return _matched(ids, queries)
