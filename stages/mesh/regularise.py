"""Smoothness terms of a closed triangle surface: normal consistency and the uniform Laplacian.

Both are means, so they do not grow with the mesh; the stage's weights carry the scale of the summed SDS loss.
Letters: V vertices, F faces, M edges; `edges` [M, 2] and `sides` [M, 2] as from stages.kernels.marching.mesh_edges.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stages.errors import check_shape


def face_cross(vertices: Tensor, faces: Tensor) -> Tensor:
    """Face normals times twice the face area, [F, 3]."""
    corners = vertices.index_select(0, faces.reshape(-1).long()).view(-1, 3, 3)
    a, b, c = corners.unbind(1)
    return torch.linalg.cross(b - a, c - a)


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and lengths [., 1]; zero without gradient where the length is below 1e-18."""
    square = vectors.square().sum(-1, keepdim=True)
    valid = square > 1e-36
    length = torch.where(valid, square, 1).sqrt()
    return torch.where(valid, vectors / length, torch.zeros_like(vectors)), torch.where(valid, length, 0)


def normal_consistency(
    vertices: Tensor, faces: Tensor, edges: Tensor, sides: Tensor, *, kind: Literal["face", "vertex"] = "face"
) -> Tensor:
    """Mean over the edges of 1 - cos between the normals on either side; 0 for a plane.

    kind "face" compares the two faces of an edge (Magic3D's angular difference of adjacent faces), weighted by the
    smaller of their areas: marching tetrahedra makes slivers, whose normals turn by 1 / height when a vertex
    moves, and the weight (held constant in the gradient) takes exactly that factor out.
    kind "vertex" compares the area-weighted vertex normals at its ends (threestudio models/mesh.py).

    Args:
        vertices: [V, 3]. faces: [F, 3]. edges, sides: [M, 2].
    Returns: a scalar in [0, 2]. Differentiable in vertices.
    """
    check_shape("edges", edges, (None, 2))
    check_shape("sides", sides, (edges.shape[0], 2))
    cross = face_cross(vertices, faces)
    if kind == "face":
        normals, area = _unit(cross)
        first, second = sides[:, 0].long(), sides[:, 1].long()
        cosine = (normals.index_select(0, first) * normals.index_select(0, second)).sum(-1)
        with torch.no_grad():
            weight = torch.minimum(area[first, 0], area[second, 0])
            weight = weight / weight.sum().clamp_min(1e-30)
        return (weight * (1 - cosine)).sum()
    if kind == "vertex":
        total = torch.zeros_like(vertices).index_add(0, faces.T.reshape(-1).long(), cross.repeat(3, 1))
        normals, _ = _unit(total)
        cosine = (normals.index_select(0, edges[:, 0].long()) * normals.index_select(0, edges[:, 1].long())).sum(-1)
        return (1 - cosine).mean()
    raise ValueError(f"kind: wanted 'face' or 'vertex', got {kind!r}")


def laplacian(vertices: Tensor, faces: Tensor, edges: Tensor, *, tangential: bool = False) -> Tensor:
    """Mean squared distance of the vertices from the mean of their neighbours, in units of the mean edge length.

    The uniform Laplacian (Desbrun et al. 1999, umbrella operator). Its tangential part evens out the spacing of
    vertices. A vertex of marching tetrahedra moves along its lattice edge only, so evening out would bend a flat
    surface; unless `tangential`, only the part along the vertex normal counts (normal and edge length held constant).

    Args:
        vertices: [V, 3]. faces: [F, 3]. edges: [M, 2].
    Returns: a scalar >= 0. Differentiable in vertices.
    """
    check_shape("edges", edges, (None, 2))
    a, b = edges[:, 0].long(), edges[:, 1].long()
    start, end = vertices.index_select(0, a), vertices.index_select(0, b)
    with torch.no_grad():
        one = torch.ones(len(edges), dtype=vertices.dtype, device=vertices.device)
        degree = torch.zeros(len(vertices), dtype=vertices.dtype, device=vertices.device)
        degree = degree.index_add(0, a, one).index_add(0, b, one).clamp_min(1)
        length = (end - start).norm(dim=-1).mean().clamp_min(1e-12)
    total = torch.zeros_like(vertices).index_add(0, a, end - start).index_add(0, b, start - end)
    delta = total / (degree[:, None] * length)
    if not tangential:
        with torch.no_grad():
            cross = face_cross(vertices, faces)
            normals, _ = _unit(torch.zeros_like(vertices).index_add(0, faces.T.reshape(-1).long(), cross.repeat(3, 1)))
        delta = (delta * normals).sum(-1)
        return delta.square().mean()
    return delta.square().sum(-1).mean()
