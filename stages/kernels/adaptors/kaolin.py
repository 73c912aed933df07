"""kaolin's marching tetrahedra behind ours: kaolin.ops.conversions.marching_tetrahedra, Apache-2.0.

How the conventions meet (kaolin 0.10 to 0.18; it is plain torch, so it runs on any device):
    sign         kaolin counts a vertex where its value is > 0, ours where it is >= 0; the guard moves every value away
                 from zero, so what reaches kaolin has no zero and keeps our sign, and its faces turn out as ours do
    guard        with s' = s +- guard, kaolin's s'_a / (s'_a - s'_b) is our (|s_a| + guard) / (|s_a| + |s_b| + 2 guard)
    vertices     kaolin numbers crossing edges by their ends (lower, higher), ours by the edge's index: sorted back
    faces        kaolin lists tetrahedra with one triangle first, ours goes by tetrahedron: sorted back
So vertices and their edges are the torch twin's, and face k lies in the same tetrahedron and turns the same way. It may
begin at another corner, and with vertices {1, 2} or {0, 3} inside kaolin cuts the quadrilateral, which is plane but for
the guard, along its other diagonal. Letters as in marching.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.kernels.reference.marching import crossing_edges


def march(
    positions: Tensor, sdf: Tensor, edges: Tensor, tets: Tensor, tet_edges: Tensor, guard: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return vertices [V, 3], faces [F, 3] int32 and each vertex's lattice edge [V] int32; see marching_tetrahedra.

    Raises: ValueError where an edge changes sign that belongs to no tetrahedron: kaolin does not see such edges.
    """
    from kaolin.ops.conversions import marching_tetrahedra

    crossing = crossing_edges(sdf.detach(), edges)  # [V]
    if not len(crossing):
        return positions.new_zeros(0, 3), edges.new_zeros(0, 3, dtype=torch.int32), crossing.int()
    guarded = torch.where(sdf < 0, sdf - guard, sdf + guard)  # not sign(): an exact zero is outside and has a gradient
    surface = marching_tetrahedra(positions[None], tets.long(), guarded[None], return_tet_idx=True)
    vertices, faces, owners = (batch[0] for batch in surface)
    if len(vertices) != len(crossing):
        got = f"{len(crossing)} crossing edges, {len(vertices)} of them in a tetrahedron"
        raise ValueError(f"edges: wanted every crossing edge in a tetrahedron (the kaolin backend), got {got}")
    low, high = edges[crossing].long().aminmax(dim=1)
    order = (low * positions.shape[0] + high).argsort()  # kaolin's vertex k lies on edge chosen[order[k]]
    by_tet = owners.argsort(stable=True)
    return vertices[order.argsort()], order[faces[by_tet]].int(), crossing.int()
