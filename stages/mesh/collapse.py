"""Quadric edge collapse that cannot break a manifold: the decimator behind `clean.decimate`.

Algorithm: Garland & Heckbert 1997 (surface simplification with quadric error metrics) with the link condition of Dey,
Edelsbrunner, Guha & Nekhayev 1999, so a closed orientable manifold stays one, of the same genus. Collapses that turn
a face over are refused; those that leave a sliver are put off. fast-simplification 0.2 is about 3 times faster on
rough surfaces, but there it left up to 12 edges with three or more faces (marching tetrahedra, 36k and 58k faces), and
it took 14 % of a table's volume without reaching its face budget (flat regions make its quadrics singular); this one
lost 0.1 % of that volume at a twentieth of the faces.

Letters: a quadric is x^T A x - 2 b^T x + c, stored as 10 numbers (xx, xy, xz, yy, yz, zz of A; b; c). A corner is
3 face + position in the face. numba is imported at the top, so import this module only where it is used; the kernels
are written in scalars because array expressions compile more slowly (12 s against 9 s in all).
"""

from __future__ import annotations

import numpy as np

from stages.kernels.cpu.jit import njit

# Pull of a vertex's quadric towards where it was, per unit area: keeps flat regions non-singular and evenly meshed.
ANCHOR = 1e-3
# Weight of the planes that stand on boundary edges, against 1 for the faces: open borders keep their outline.
BORDER = 10.0
# A face may turn by at most acos(0.3) = 73 degrees in one collapse.
MIN_COS = 0.3
# A face below this share of its neighbourhood's area is judged by the neighbourhood's normal instead of its own.
SMALL = 0.01
# A collapse that leaves a face of quality (1 = equilateral) below SLIVER, and worse than before, is put off by a cost
# of DELAY edge lengths of distance (squared); below NEEDLE it is refused.
SLIVER, NEEDLE, DELAY = 0.15, 0.003, 0.03


@njit(cache=True)
def _add_plane(q, nx, ny, nz, d, w):
    q[0] += w * nx * nx
    q[1] += w * nx * ny
    q[2] += w * nx * nz
    q[3] += w * ny * ny
    q[4] += w * ny * nz
    q[5] += w * nz * nz
    q[6] -= w * d * nx
    q[7] -= w * d * ny
    q[8] -= w * d * nz
    q[9] += w * d * d


@njit(cache=True)
def _normal(p, q, r):
    """Twice the area vector of a triangle given as three tuples."""
    ux, uy, uz = q[0] - p[0], q[1] - p[1], q[2] - p[2]
    vx, vy, vz = r[0] - p[0], r[1] - p[1], r[2] - p[2]
    return uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx


@njit(cache=True)
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@njit(cache=True)
def _square_distance(p, q):
    return (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 + (p[2] - q[2]) ** 2


@njit(cache=True)
def _quality(p, q, r, double_area):
    """4 sqrt(3) area / sum of squared edges: 1 for an equilateral triangle, 0 for a degenerate one."""
    total = _square_distance(p, q) + _square_distance(q, r) + _square_distance(r, p)
    return 3.4641016151377544 * double_area / total if total > 0 else 0.0


@njit(cache=True)
def _at(points, v):
    return points[v, 0], points[v, 1], points[v, 2]


@njit(cache=True)
def _quadrics(points, faces, border):
    """Area-weighted plane quadrics of the faces around each vertex, with anchors and border planes."""
    quadrics = np.zeros((points.shape[0], 10))
    for f in range(faces.shape[0]):
        nx, ny, nz = _normal(_at(points, faces[f, 0]), _at(points, faces[f, 1]), _at(points, faces[f, 2]))
        length = np.sqrt(nx * nx + ny * ny + nz * nz)
        if length <= 1e-300:
            continue
        nx, ny, nz = nx / length, ny / length, nz / length
        for c in range(3):
            a = faces[f, c]
            px, py, pz = _at(points, a)
            q = quadrics[a]
            _add_plane(q, nx, ny, nz, -(nx * px + ny * py + nz * pz), length / 6)
            w = ANCHOR * length / 6
            _add_plane(q, 1.0, 0.0, 0.0, -px, w)
            _add_plane(q, 0.0, 1.0, 0.0, -py, w)
            _add_plane(q, 0.0, 0.0, 1.0, -pz, w)
            if border[f, c]:
                b = faces[f, (c + 1) % 3]
                ex, ey, ez = points[b, 0] - px, points[b, 1] - py, points[b, 2] - pz
                mx, my, mz = ey * nz - ez * ny, ez * nx - ex * nz, ex * ny - ey * nx
                s = np.sqrt(mx * mx + my * my + mz * mz)
                if s > 1e-300:
                    mx, my, mz = mx / s, my / s, mz / s
                    d = -(mx * px + my * py + mz * pz)
                    _add_plane(q, mx, my, mz, d, BORDER * s * s)
                    _add_plane(quadrics[b], mx, my, mz, d, BORDER * s * s)
    return quadrics


@njit(cache=True)
def _error(q, x):
    return (
        q[0] * x[0] * x[0] + 2 * q[1] * x[0] * x[1] + 2 * q[2] * x[0] * x[2] + q[3] * x[1] * x[1]
        + 2 * q[4] * x[1] * x[2] + q[5] * x[2] * x[2] - 2 * (q[6] * x[0] + q[7] * x[1] + q[8] * x[2]) + q[9]
    )  # fmt: skip


@njit(cache=True)
def _plan(points, quadrics, a, b, q):
    """Return where edge a b would collapse to, and its cost; leaves the summed quadric in `q`.

    The point is the quadric's minimiser, or the best of both ends and the middle where that lies far off the edge.
    """
    for k in range(10):
        q[k] = quadrics[a, k] + quadrics[b, k]
    p, r = _at(points, a), _at(points, b)
    c0, c1, c2 = q[3] * q[5] - q[4] * q[4], q[2] * q[4] - q[1] * q[5], q[1] * q[4] - q[2] * q[3]
    det = q[0] * c0 + q[1] * c1 + q[2] * c2
    trace = q[0] + q[3] + q[5]
    middle = ((p[0] + r[0]) / 2, (p[1] + r[1]) / 2, (p[2] + r[2]) / 2)
    best, least = middle, _error(q, middle)
    if det > 1e-12 * trace * trace * trace:
        c3, c4, c5 = q[0] * q[5] - q[2] * q[2], q[1] * q[2] - q[0] * q[4], q[0] * q[3] - q[1] * q[1]
        x = (
            (c0 * q[6] + c1 * q[7] + c2 * q[8]) / det,
            (c1 * q[6] + c3 * q[7] + c4 * q[8]) / det,
            (c2 * q[6] + c4 * q[7] + c5 * q[8]) / det,
        )
        if _square_distance(x, middle) <= 4 * _square_distance(p, r):
            return x, max(_error(q, x), 0.0)
    if _error(q, p) < least:
        best, least = p, _error(q, p)
    if _error(q, r) < least:
        best, least = r, _error(q, r)
    return best, max(least, 0.0)


@njit(cache=True)
def _less(cost, entry, i, j):
    if cost[i] != cost[j]:
        return cost[i] < cost[j]
    if entry[i, 0] != entry[j, 0]:
        return entry[i, 0] < entry[j, 0]
    return entry[i, 1] < entry[j, 1]


@njit(cache=True)
def _swap(cost, entry, i, j):
    cost[i], cost[j] = cost[j], cost[i]
    for k in range(5):
        entry[i, k], entry[j, k] = entry[j, k], entry[i, k]


@njit(cache=True)
def _sift_up(cost, entry, i):
    while i > 0 and _less(cost, entry, i, (i - 1) // 2):
        _swap(cost, entry, i, (i - 1) // 2)
        i = (i - 1) // 2


@njit(cache=True)
def _sift_down(cost, entry, i, size):
    while True:
        child = 2 * i + 1
        if child >= size:
            return
        if child + 1 < size and _less(cost, entry, child + 1, child):
            child += 1
        if not _less(cost, entry, child, i):
            return
        _swap(cost, entry, i, child)
        i = child


@njit(cache=True)
def _linked(faces, alive, head, following, on_border, mark, a, b):
    """The link condition: whether collapsing edge a b keeps the surface a manifold. `mark` is zero before and after."""
    corner = head[a]
    while corner >= 0:
        if alive[corner // 3]:
            for k in range(3):
                mark[faces[corner // 3, k]] = 1
        corner = following[corner]
    shared, edge_faces, ok = 0, 0, True
    corner = head[b]
    while corner >= 0:
        f = corner // 3
        if alive[f]:
            at_edge = faces[f, 0] == a or faces[f, 1] == a or faces[f, 2] == a
            edge_faces += at_edge
            for k in range(3):
                v = faces[f, k]
                if v != a and v != b and mark[v] == 1:
                    mark[v] = 2
                    shared += 1
                if at_edge and v != a and v != b:
                    # The third vertex must keep enough faces, or two faces would fold onto each other.
                    count, other = 0, head[v]
                    while other >= 0:
                        count += alive[other // 3]
                        other = following[other]
                    ok &= count >= (2 if on_border[v] else 4)
        corner = following[corner]
    corner = head[a]
    while corner >= 0:
        for k in range(3):
            mark[faces[corner // 3, k]] = 0
        corner = following[corner]
    both = on_border[a] and on_border[b]  # an inner edge between two borders would pinch them together
    return ok and shared == edge_faces and edge_faces == (1 if both else 2)


@njit(cache=True)
def _judge(points, faces, alive, head, following, a, b, x):
    """0: collapsing edge a b to x turns a face over or leaves a needle; 1: it leaves a sliver; 2: it is fine."""
    mx, my, mz, area = 0.0, 0.0, 0.0, 0.0
    worst_before, worst = 1.0, 1.0
    for v in (a, b):
        corner = head[v]
        while corner >= 0:
            f = corner // 3
            if alive[f]:
                p, q, r = _at(points, faces[f, 0]), _at(points, faces[f, 1]), _at(points, faces[f, 2])
                n = _normal(p, q, r)
                length = np.sqrt(_dot(n, n))
                worst_before = min(worst_before, _quality(p, q, r, length))
                mx, my, mz, area = mx + n[0], my + n[1], mz + n[2], area + length
            corner = following[corner]
    mean, mean_length = (mx, my, mz), np.sqrt(mx * mx + my * my + mz * mz)
    for v in (a, b):
        corner = head[v]
        while corner >= 0:
            f = corner // 3
            i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
            if alive[f] and not ((i == a or j == a or k == a) and (i == b or j == b or k == b)):
                p, q, r = _at(points, i), _at(points, j), _at(points, k)
                old = _normal(p, q, r)
                old_length = np.sqrt(_dot(old, old))
                if i == v:
                    p = x
                elif j == v:
                    q = x
                else:
                    r = x
                new = _normal(p, q, r)
                length = np.sqrt(_dot(new, new))
                worst = min(worst, _quality(p, q, r, length))
                if old_length < SMALL * area:
                    if _dot(new, mean) < MIN_COS * length * mean_length:
                        return 0
                elif _dot(new, old) < MIN_COS * length * old_length:
                    return 0
            corner = following[corner]
    if worst < NEEDLE and worst < worst_before:
        return 0
    return 1 if worst < SLIVER and worst < worst_before else 2


@njit(cache=True)
def _offer(cost, entry, size, price, a, b, version, judged):
    """Push edge a b; `judged` 1 says that its sliver is already paid for."""
    cost[size] = price
    low, high = min(a, b), max(a, b)
    entry[size, 0], entry[size, 1] = low, high
    entry[size, 2], entry[size, 3], entry[size, 4] = version[low], version[high], judged
    _sift_up(cost, entry, size)
    return size + 1


@njit(cache=True)
def collapse_edges(points, faces, attributes, border, target):
    """Collapse the cheapest allowed edges until `target` faces are left, in place.

    Args:
        points: [V, 3] float64.
        faces: [F, 3] int64.
        attributes: [V, C] float64, interpolated along collapsed edges.
        border: [F, 3] bool, whether the half edge from corner k to k + 1 has no opposite.
        target: faces to stop at; more are left if no allowed collapse remains.
    Returns: alive [F] bool, the faces that remain.
    """
    vertices, total = points.shape[0], faces.shape[0]
    alive = np.ones(total, dtype=np.bool_)
    on_border = np.zeros(vertices, dtype=np.bool_)
    head, tail = np.full(vertices, -1), np.full(vertices, -1)  # linked lists of the corners at each vertex
    following = np.full(3 * total, -1)
    for f in range(total):
        for k in range(3):
            v = faces[f, k]
            if head[v] < 0:
                head[v] = 3 * f + k
            else:
                following[tail[v]] = 3 * f + k
            tail[v] = 3 * f + k
            if border[f, k]:
                on_border[v] = True
                on_border[faces[f, (k + 1) % 3]] = True
    quadrics, q = _quadrics(points, faces, border), np.empty(10)
    version = np.zeros(vertices, dtype=np.int64)
    mark = np.zeros(vertices, dtype=np.int8)
    capacity, size, left = 6 * total + 64, 0, total
    cost, entry = np.empty(capacity), np.empty((capacity, 5), dtype=np.int64)
    for f in range(total):
        for k in range(3):
            a, b = faces[f, k], faces[f, (k + 1) % 3]
            if a < b or border[f, k]:
                _, price = _plan(points, quadrics, a, b, q)
                size = _offer(cost, entry, size, price, a, b, version, 0)

    while left > target and size > 0:
        a, b, judged, price = entry[0, 0], entry[0, 1], entry[0, 4], cost[0]
        fresh = entry[0, 2] == version[a] and entry[0, 3] == version[b]
        size -= 1
        _swap(cost, entry, 0, size)
        _sift_down(cost, entry, 0, size)
        if not fresh or not _linked(faces, alive, head, following, on_border, mark, a, b):
            continue
        x, _ = _plan(points, quadrics, a, b, q)
        verdict = _judge(points, faces, alive, head, following, a, b, x)
        if verdict == 0:
            continue
        p, r = _at(points, a), _at(points, b)
        length = _square_distance(p, r)
        if verdict == 1 and judged == 0:
            weight = (q[0] + q[3] + q[5]) / (1 + 3 * ANCHOR)  # the area behind the quadric
            price += DELAY * DELAY * length * weight
            size = _offer(cost, entry, size, price, a, b, version, 1)
            continue
        t = 0.5
        if length > 0:
            t = ((x[0] - p[0]) * (r[0] - p[0]) + (x[1] - p[1]) * (r[1] - p[1]) + (x[2] - p[2]) * (r[2] - p[2])) / length
            t = min(max(t, 0.0), 1.0)
        for k in range(attributes.shape[1]):
            attributes[a, k] = (1 - t) * attributes[a, k] + t * attributes[b, k]
        points[a, 0], points[a, 1], points[a, 2] = x
        for k in range(10):
            quadrics[a, k] = q[k]
        version[a] += 1
        version[b] = -1  # gone
        on_border[a] |= on_border[b]
        corner = head[b]
        while corner >= 0:
            f = corner // 3
            if alive[f]:
                if faces[f, 0] == a or faces[f, 1] == a or faces[f, 2] == a:
                    alive[f] = False
                    left -= 1
                else:
                    faces[f, corner % 3] = a
            corner = following[corner]
        following[tail[a]] = head[b]
        # Relink a's list without dead corners, and offer all of its edges again.
        corner, head[a] = head[a], -1
        while corner >= 0:
            f, after = corner // 3, following[corner]
            if alive[f]:
                if head[a] < 0:
                    head[a] = corner
                else:
                    following[tail[a]] = corner
                tail[a] = corner
                following[corner] = -1
                if size + 2 > capacity:
                    capacity *= 2
                    more_cost, more_entry = np.empty(capacity), np.empty((capacity, 5), dtype=np.int64)
                    for i in range(size):  # slices would compile numpy's broadcasting, and its messages, for 3 s
                        more_cost[i] = cost[i]
                        for k in range(5):
                            more_entry[i, k] = entry[i, k]
                    cost, entry = more_cost, more_entry
                for side in range(1, 3):
                    v = faces[f, (corner % 3 + side) % 3]
                    if side == 1 or on_border[a]:  # an inner edge leaves the vertex in just one of its two faces
                        _, price = _plan(points, quadrics, a, v, q)
                        size = _offer(cost, entry, size, price, a, v, version, 0)
            corner = after
    return alive
