"""Marching tetrahedra on an indexed band of tetrahedra, and the edges of the surface that comes out.

Letters: N lattice vertices, E lattice edges, T tetrahedra; V vertices, F faces, M edges of the surface.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.errors import check_shape
from stages.kernels.backend import choose_backend
from stages.kernels.dispatch import module
from stages.kernels.indices import check_indices, set_extent
from stages.kernels.reference import marching as twin
from stages.kernels.untraced import stepped_over, untraced


def marching_tetrahedra(
    positions: Tensor,
    sdf: Tensor,
    edges: Tensor,
    tets: Tensor,
    tet_edges: Tensor,
    *,
    guard: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Extract the zero level set of a piecewise linear function; DMTet (Shen et al. 2021) eq. 1.

    A vertex is inside where sdf < 0, so an exact zero is outside. The crossing of an edge (a, b) lies at
    t = (|s_a| + guard) / (|s_a| + |s_b| + 2 guard) from a: equal to s_a / (s_a - s_b) up to guard, never a division by
    zero, never exactly at an end (no face without area), and with a gradient that is bounded by 1 / guard and never 0.
    Where the tetrahedra around every crossing edge are present, the surface is closed, manifold and oriented outwards.

    Args:
        positions: [N, 3].
        sdf: [N], finite, same unit as guard.
        edges: [E, 2], tets: [T, 4] positively oriented, tet_edges: [T, 6] in the order 01 02 03 12 13 23; all int32.
        guard: smallest distance a vertex counts for, > 0; a thousandth of a cell is far below what can be seen.
        backend: a key of stages.kernels.backend.BACKENDS.
    Returns: vertices [V, 3], faces [F, 3] int32 counter-clockwise from outside, and the lattice edge [V] int32 of each
        vertex, ascending. Differentiable in positions and sdf. Not differentiable in: faces, that is in topology.
    Raises: ValueError naming argument, wanted and got.
    """
    check_shape("positions", positions, (None, 3))
    check_shape("sdf", sdf, (positions.shape[0],))
    check_shape("edges", edges, (None, 2))
    check_shape("tets", tets, (None, 4))
    check_shape("tet_edges", tet_edges, (tets.shape[0], 6))
    if not guard > 0:
        raise ValueError(f"guard: wanted > 0, got {guard}")
    check_indices("edges", edges, len(sdf))
    check_indices("tets", tets, len(sdf))
    check_indices("tet_edges", tet_edges, len(edges))
    backend = choose_backend(backend, positions, sdf, family="marching", adaptor=True)
    if backend in ("numba", "warp"):
        arguments = (positions, sdf, edges.int(), tets.int(), tet_edges.int(), guard, backend)
        vertices, faces, crossing = untraced(_March.apply, *arguments)
        return vertices, set_extent(faces, 0, len(vertices) - 1), crossing
    if backend == "kaolin":
        from stages.kernels.adaptors import kaolin

        return untraced(kaolin.march, positions, sdf, edges, tets, tet_edges, guard)
    return twin.march(positions, sdf, edges, tets, tet_edges, guard)


def mesh_edges(faces: Tensor, vertices: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """List the undirected edges of a closed oriented triangle surface and the two faces at each.

    Args:
        faces: [F, 3] int32 indices below `vertices`.
    Returns: edges [M, 2] int32, lower vertex first, sorted; sides [M, 2] int32, first the face that runs from the lower
        to the higher vertex.
    Raises: ValueError unless every edge has exactly two half edges of opposite direction.
    """
    check_shape("faces", faces, (None, 3))
    check_indices("faces", faces, vertices)
    backend = choose_backend(backend, torch.empty(0, device=faces.device), family="marching")
    if backend == "torch":
        return twin.mesh_edges(faces, vertices)
    topology = untraced(_mesh_edges, backend, faces.int(), vertices)
    if topology is None:
        raise ValueError("faces: wanted a closed oriented surface, got an edge without exactly two opposite half edges")
    return set_extent(topology[0], 0, vertices - 1), set_extent(topology[1], 0, len(faces) - 1)


def _mesh_edges(backend: str, faces: Tensor, vertices: int) -> tuple[Tensor, Tensor] | None:
    return module(backend, "marching").mesh_edges(faces, vertices)


class _March(torch.autograd.Function):
    @staticmethod
    def forward(ctx, positions, sdf, edges, tets, tet_edges, guard, backend):
        arguments = (positions, sdf, edges, tets, tet_edges, guard)
        vertices, faces, crossing = module(backend, "marching").march(*arguments)
        ctx.save_for_backward(positions, sdf, edges, crossing)
        ctx.guard, ctx.backend = guard, backend
        ctx.mark_non_differentiable(faces, crossing)
        return vertices, faces, crossing

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        grads = module(ctx.backend, "marching").crossing_backward(*ctx.saved_tensors, ctx.guard, grad)
        return *grads, None, None, None, None, None
