"""Warp kernels behind stages/kernels/marching.py; functions as in cpu/marching.py, on contiguous tensors.

Vertices and faces are numbered by prefix sums over flags, so they come out in the order of their edges and tetrahedra,
as on the CPU, and only tetrahedra of the band that is passed are ever looked at. How many there are has to reach the
host, which allocates them: the one wait for the device in `march`. `mesh_edges` waits once too, to refuse a surface
that is not closed. Gradients are the same bytes in every run; see cuda/sums.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import warp as wp
from torch import Tensor

from stages.kernels.cuda import sums as cuda_sums
from stages.kernels.cuda.launch import launch
from stages.kernels.reference.marching import TRIANGLES

wp.set_module_options({"enable_backward": False, "fuse_fp": False})

ZERO = wp.constant(wp.float32(0.0))
ONE = wp.constant(wp.float32(1.0))


@lru_cache(maxsize=16)
def _table(device: torch.device) -> Tensor:
    return torch.tensor(TRIANGLES, dtype=torch.int32, device=device)


@wp.kernel
def _flag_edges(sdf: wp.array(dtype=wp.float32), edges: wp.array(dtype=wp.vec2i), flags: wp.array(dtype=wp.int32)):
    e = wp.tid()
    ends = edges[e]
    crosses = int(0)
    if (sdf[ends[0]] < ZERO) != (sdf[ends[1]] < ZERO):
        crosses = 1
    flags[e] = crosses


@wp.func
def _code(sdf: wp.array(dtype=wp.float32), tet: wp.vec4i):
    code = int(0)
    for k in range(4):
        if sdf[tet[k]] < ZERO:
            code = code | (1 << k)
    return code


@wp.kernel
def _count_faces(
    sdf: wp.array(dtype=wp.float32),
    tets: wp.array(dtype=wp.vec4i),
    table: wp.array2d(dtype=wp.int32),
    offset: int,
    flags: wp.array(dtype=wp.int32),
):
    t = wp.tid()
    code = _code(sdf, tets[t])
    count = int(0)
    if table[code, 0] >= 0:
        count = 1
    if table[code, 3] >= 0:
        count = 2
    flags[offset + t] = count


@wp.func
def _from_end(sdf: wp.array(dtype=wp.float32), vertex: int, guard: wp.float32):
    return wp.abs(sdf[vertex]) + guard


@wp.kernel
def _place_vertices(
    positions: wp.array(dtype=wp.vec3f),
    sdf: wp.array(dtype=wp.float32),
    edges: wp.array(dtype=wp.vec2i),
    guard: wp.float32,
    flags: wp.array(dtype=wp.int32),
    ends: wp.array(dtype=wp.int32),
    vertices: wp.array(dtype=wp.vec3f),
    crossing: wp.array(dtype=wp.int32),
):
    e = wp.tid()
    if flags[e] == 0:
        return
    a, b = edges[e][0], edges[e][1]
    from_a, from_b = _from_end(sdf, a, guard), _from_end(sdf, b, guard)
    t = from_a / (from_a + from_b)
    v = ends[e] - 1
    vertices[v] = positions[a] * (ONE - t) + positions[b] * t
    crossing[v] = e


@wp.kernel
def _place_faces(
    sdf: wp.array(dtype=wp.float32),
    tets: wp.array(dtype=wp.vec4i),
    tet_edges: wp.array2d(dtype=wp.int32),
    table: wp.array2d(dtype=wp.int32),
    edges: int,
    vertices: int,
    flags: wp.array(dtype=wp.int32),
    ends: wp.array(dtype=wp.int32),
    faces: wp.array2d(dtype=wp.int32),
):
    t = wp.tid()
    count = flags[edges + t]
    if count == 0:
        return
    code = _code(sdf, tets[t])
    first = ends[edges + t] - vertices - count
    for n in range(count):
        for k in range(3):
            faces[first + n, k] = ends[tet_edges[t, table[code, 3 * n + k]]] - 1


def march(positions: Tensor, sdf: Tensor, edges: Tensor, tets: Tensor, tet_edges: Tensor, guard: float):
    """Return vertices [V, 3], faces [F, 3] int32 and the edge [V] int32 of each vertex.

    Args:
        positions: [N, 3] float32.
        sdf: [N] float32.
        edges: [E, 2] int32.
        tets: [T, 4] int32.
        tet_edges: [T, 6] int32.
        guard: as in marching_tetrahedra.
    """
    device, n_edges, n_tets = sdf.device, len(edges), len(tets)
    table = _table(device)
    flags = torch.empty(n_edges + n_tets, dtype=torch.int32, device=device)
    launch(_flag_edges, n_edges, (sdf, edges, flags))
    launch(_count_faces, n_tets, (sdf, tets, table, n_edges, flags))
    ends = flags.cumsum(0, dtype=torch.int32)
    before = torch.nn.functional.pad(ends, (1, 0))  # a sum of nothing, for bands without edges or tetrahedra
    n_vertices, both = torch.stack([before[n_edges], before[-1]]).tolist()
    vertices = torch.empty(n_vertices, 3, device=device)
    crossing = torch.empty(n_vertices, dtype=torch.int32, device=device)
    faces = torch.empty(both - n_vertices, 3, dtype=torch.int32, device=device)
    launch(_place_vertices, n_edges, (positions, sdf, edges, guard, flags, ends, vertices, crossing))
    launch(_place_faces, n_tets, (sdf, tets, tet_edges, table, n_edges, n_vertices, flags, ends, faces))
    return vertices, faces, crossing


@wp.kernel
def _place_back(
    positions: wp.array(dtype=wp.vec3f),
    sdf: wp.array(dtype=wp.float32),
    edges: wp.array(dtype=wp.vec2i),
    crossing: wp.array(dtype=wp.int32),
    guard: wp.float32,
    grad: wp.array(dtype=wp.vec3f),
    peak: wp.array(dtype=wp.float32),
    total: wp.array(dtype=wp.int64),
    unit: wp.float64,
):
    v = wp.tid()
    ends = edges[crossing[v]]
    a, b = ends[0], ends[1]
    from_a, from_b = _from_end(sdf, a, guard), _from_end(sdf, b, guard)
    scale = ONE / (from_a + from_b)
    t = from_a * scale
    g = grad[v]
    along = wp.dot(g, positions[b] - positions[a]) * scale
    for k in range(3):
        cuda_sums.add(peak, total, unit, 4 * a + k, wp.float64(g[k] * (ONE - t)))
        cuda_sums.add(peak, total, unit, 4 * b + k, wp.float64(g[k] * t))
    up_a, up_b = along * (ONE - t), -along * t
    if sdf[a] < ZERO:
        up_a = -up_a
    if sdf[b] < ZERO:
        up_b = -up_b
    cuda_sums.add(peak, total, unit, 4 * a + 3, wp.float64(up_a))
    cuda_sums.add(peak, total, unit, 4 * b + 3, wp.float64(up_b))


def crossing_backward(positions: Tensor, sdf: Tensor, edges: Tensor, crossing: Tensor, guard: float, grad: Tensor):
    """Return gradients (positions [N, 3], sdf [N]) of the crossing points from grad [V, 3]."""

    def run(peak: Tensor, total: Tensor, unit: float) -> None:
        launch(_place_back, len(crossing), (positions, sdf, edges, crossing, guard, grad, peak, total, unit))

    sums = cuda_sums.collect((len(sdf), 4), len(crossing), sdf.device, run).float()
    return sums[:, :3].contiguous(), sums[:, 3].contiguous()


def mesh_edges(faces: Tensor, vertices: int) -> tuple[Tensor, Tensor] | None:
    """Return edges [M, 2] and sides [M, 2] of faces [F, 3], all int32; None unless closed and oriented."""
    start, end = faces.reshape(-1).long(), faces.roll(-1, 1).reshape(-1).long()
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    key = (low * vertices + high) * 2 + (start > end)  # an edge's two half edges: 2 n upwards, 2 n + 1 downwards
    if len(key) % 2:
        return None
    key, order = key.sort(stable=True)
    upwards, downwards = key[0::2], key[1::2]
    paired = (upwards % 2 == 0) & (downwards == upwards + 1)
    apart = upwards[1:] != upwards[:-1]
    if not bool(paired.all() & apart.all()):
        return None
    edge = upwards // 2
    return torch.stack([edge // vertices, edge % vertices], -1).int(), (order // 3).reshape(-1, 2).int()
