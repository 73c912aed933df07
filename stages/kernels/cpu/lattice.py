"""numba kernels behind stages/mesh/tets/tetrahedra.py: set arithmetic on sorted ids, and the cells of a band.

All ids are int64 and sorted. Adding a constant keeps them sorted, so a neighbour search over the whole band is one
merge: linear, no hashing, no table as large as the cube.
"""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit
from stages.kernels.cpu.threads import each

BLOCK = 1 << 12  # vertices a task owns


@njit(cache=True, nogil=True)
def _union(a, b, shift, out):
    """Sorted union of a and b + shift into out; returns its length."""
    i = j = n = 0
    while i < a.shape[0] or j < b.shape[0]:
        if j == b.shape[0] or (i < a.shape[0] and a[i] <= b[j] + shift):
            value = a[i]
            i += 1
        else:
            value = b[j] + shift
            j += 1
        if n == 0 or out[n - 1] != value:
            out[n] = value
            n += 1
    return n


@njit(cache=True, nogil=True)
def union_shifted(ids, shifts):
    """Return the sorted union of ids and of ids + s for every shift s."""
    total = ids
    for s in shifts:
        out = np.empty(total.shape[0] + ids.shape[0], np.int64)
        total = out[: _union(total, ids, s, out)]
    return total


@njit(cache=True, nogil=True)
def neighbours(ids, shifts, ahead, behind):
    """Fill ahead [N, K] with the index of ids + shifts[k], behind with that of ids - shifts[k], -1 where missing."""
    n = ids.shape[0]
    ahead[:] = -1
    behind[:] = -1
    for k in range(shifts.shape[0]):
        shift = shifts[k]
        j = 0
        for i in range(n):
            target = ids[i] + shift
            while j < n and ids[j] < target:
                j += 1
            if j == n:
                break
            if ids[j] == target:
                ahead[i, k] = j
                behind[j, k] = i


@njit(cache=True, nogil=True)
def number_edges(ahead):
    """Return edges [E, 2] from every vertex to those ahead of it, and their numbers [N, K] (-1 where there is none)."""
    n, directions = ahead.shape
    number = np.full((n, directions), -1, np.int32)
    count = 0
    for i in range(n):
        for k in range(directions):
            if ahead[i, k] >= 0:
                number[i, k] = count
                count += 1
    edges = np.empty((count, 2), np.int32)
    for i in range(n):
        for k in range(directions):
            e = number[i, k]
            if e >= 0:
                edges[e, 0], edges[e, 1] = i, ahead[i, k]
    return edges, number


@njit(cache=True, nogil=True)
def tetrahedra(centre, ahead, behind, number, moves):
    """Tetrahedra [T, 4] and their edges [T, 6] around the axial edges that start at `centre` vertices.

    moves [P, 6, 2] int64: for each of P tetrahedra of a centre, its six edges in the order 01 02 03 12 13 23, each as
    (direction, 1 or -1). Edges 01, 02, 03 start at the centre, 12 and 13 at vertex 1, 23 at vertex 2.
    """
    n, patterns = centre.shape[0], moves.shape[0]
    capacity = 0
    for i in range(n):
        capacity += patterns if centre[i] else 0
    tets = np.empty((capacity, 4), np.int32)
    tet_edges = np.empty((capacity, 6), np.int32)
    count = 0
    vertex = np.empty(4, np.int32)
    edge = np.empty(6, np.int32)
    for i in range(n):
        if not centre[i]:
            continue
        for p in range(patterns):
            vertex[0] = i
            complete = True
            for e in range(6):
                start = vertex[0] if e < 3 else vertex[1] if e < 5 else vertex[2]
                k = moves[p, e, 0]
                neighbour = ahead[start, k] if moves[p, e, 1] > 0 else behind[start, k]
                if neighbour < 0:
                    complete = False
                    break
                edge[e] = number[start, k] if moves[p, e, 1] > 0 else number[neighbour, k]
                if e < 3:
                    vertex[e + 1] = neighbour
            if complete:
                for k in range(4):  # numbers, not rows: numpy's broadcasting is 2 s to compile
                    tets[count, k] = vertex[k]
                for k in range(6):
                    tet_edges[count, k] = edge[k]
                count += 1
    return tets[:count].copy(), tet_edges[:count].copy()


@njit(cache=True, nogil=True)
def _prepare(block, neighbours, near, degree):
    """Neighbours with the number of rows for a missing one, and how many there are, of a block of rows."""
    n, directions = neighbours.shape
    for i in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
        count = 0
        for k in range(directions):
            j = neighbours[i, k]
            near[i, k] = n if j < 0 else j
            count += j >= 0
        degree[i] = count


@njit(cache=True, nogil=True)
def _iterate(block, near, degree, scale, keep, add, step, following, x, residual):
    """One Chebyshev iteration of a block of rows; `following` is the next one's step. A row more of both is zero."""
    n, directions = near.shape
    for i in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
        total = np.float32(0)
        for k in range(directions):
            total += step[near[i, k]]
        s = step[i]
        x[i] += s
        residual[i] -= s + scale * (degree[i] * s - total)
        following[i] = keep * s + add * residual[i]


def diffuse(neighbours, values, scale: float, pairs: list[tuple[float, float]], theta: float):
    """Chebyshev iteration for (I + scale (D - A)) x = values from x = 0; see reference_lattice.diffuse."""
    n, tasks = len(values), -(-len(values) // BLOCK)
    near, degree = np.empty(neighbours.shape, np.uint32), np.empty_like(values)  # unsigned: no look from the end
    each(tasks, _prepare, neighbours, near, degree)
    x, residual = np.zeros_like(values), values.copy()
    step, following = np.zeros(n + 1, values.dtype), np.zeros(n + 1, values.dtype)
    np.divide(values, np.float32(theta), out=step[:n])
    for keep, add in pairs:
        numbers = np.float32(scale), np.float32(keep), np.float32(add)
        each(tasks, _iterate, near, degree, *numbers, step, following, x, residual)
        step, following = following, step
    return x + step[:n]
