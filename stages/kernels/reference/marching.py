"""Plain-torch twins of stages/kernels/marching.py: the definition, any device and floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# The triangles of a positively oriented tetrahedron by its inside vertices (bit k: vertex k is inside), as triples of
# tet edges (0: 01, 1: 02, 2: 03, 3: 12, 4: 13, 5: 23), counter-clockwise seen from outside; -1 ends a row.
TRIANGLES = (
    (-1, -1, -1, -1, -1, -1),
    (0, 1, 2, -1, -1, -1),
    (0, 4, 3, -1, -1, -1),
    (1, 2, 4, 1, 4, 3),
    (1, 3, 5, -1, -1, -1),
    (2, 0, 3, 2, 3, 5),
    (0, 4, 5, 0, 5, 1),
    (2, 4, 5, -1, -1, -1),
    (2, 5, 4, -1, -1, -1),
    (0, 1, 5, 0, 5, 4),
    (3, 0, 2, 3, 2, 5),
    (1, 5, 3, -1, -1, -1),
    (4, 2, 1, 4, 1, 3),
    (0, 3, 4, -1, -1, -1),
    (0, 2, 1, -1, -1, -1),
    (-1, -1, -1, -1, -1, -1),
)


def crossing_edges(sdf: Tensor, edges: Tensor) -> Tensor:
    """Return indices [V] of the edges with exactly one end inside (sdf < 0), ascending."""
    inside = sdf < 0
    return torch.nonzero(inside[edges[:, 0].long()] != inside[edges[:, 1].long()])[:, 0]


def crossing_points(positions: Tensor, sdf: Tensor, ends: Tensor, guard: float) -> Tensor:
    """Return points [V, 3] where edges with `ends` [V, 2] cross zero, distances kept `guard` away from it."""
    a, b = ends[:, 0].long(), ends[:, 1].long()
    size = torch.where(sdf < 0, -sdf, sdf) + guard  # not abs: its gradient at an exact zero is 0
    from_a, from_b = size[a], size[b]
    t = (from_a / (from_a + from_b))[:, None]
    return positions[a] * (1 - t) + positions[b] * t


def march(
    positions: Tensor, sdf: Tensor, edges: Tensor, tets: Tensor, tet_edges: Tensor, guard: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return vertices [V, 3], faces [F, 3] int32 and the edge [V] int32 of each vertex."""
    crossing = crossing_edges(sdf.detach(), edges)
    vertices = crossing_points(positions, sdf, edges[crossing], guard)
    number = torch.full((edges.shape[0],), -1, dtype=torch.int32, device=edges.device)
    number[crossing] = torch.arange(len(crossing), dtype=torch.int32, device=edges.device)
    bits = torch.tensor([1, 2, 4, 8], device=tets.device)
    code = ((sdf.detach() < 0)[tets.long()] * bits).sum(-1)  # [T]
    table = torch.tensor(TRIANGLES, device=tets.device)
    active = torch.nonzero((code > 0) & (code < 15))[:, 0]
    corners = table[code[active]].reshape(-1, 2, 3)  # [A, 2, 3]
    of_tet = tet_edges[active].long()[:, None].expand(-1, 2, -1)
    faces = number[torch.gather(of_tet, 2, corners.clamp_min(0))]
    return vertices, faces[corners[..., 0] >= 0].reshape(-1, 3), crossing.int()


def mesh_edges(faces: Tensor, vertices: int) -> tuple[Tensor, Tensor]:
    """Return edges [M, 2] int32 and their faces [M, 2] int32 of a closed oriented surface; see marching.mesh_edges."""
    start, end = faces.reshape(-1).long(), faces.roll(-1, 1).reshape(-1).long()
    face = torch.arange(faces.shape[0], device=faces.device).repeat_interleave(3)
    forward = start < end
    key = torch.minimum(start, end) * vertices + torch.maximum(start, end)
    left, order = key[forward].sort(stable=True)
    right, reverse = key[~forward].sort(stable=True)
    if left.shape != right.shape or not torch.equal(left, right) or bool((left[1:] == left[:-1]).any()):
        raise ValueError("faces: wanted a closed oriented surface, got an edge without exactly two opposite half edges")
    sides = torch.stack([face[forward][order], face[~forward][reverse]], -1)
    return torch.stack([left // vertices, left % vertices], -1).int(), sides.int()
