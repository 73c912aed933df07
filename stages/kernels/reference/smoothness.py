"""Plain-torch definition of stages/kernels/smoothness.py; letters as there."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.kernels.reference.raster import NORMAL_SQUARE_MIN


def face_cross(vertices: Tensor, faces: Tensor) -> Tensor:
    """Face normals times twice the face area, [F, 3]."""
    corners = vertices.index_select(0, faces.reshape(-1).long()).view(-1, 3, 3)
    a, b, c = corners.unbind(1)
    return torch.linalg.cross(b - a, c - a)


def unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit vectors and lengths [., 1]; zero, without gradient, for one too short to have a direction."""
    square = vectors.square().sum(-1, keepdim=True)
    valid = square > NORMAL_SQUARE_MIN
    length = torch.where(valid, square, 1).sqrt()
    return torch.where(valid, vectors / length, torch.zeros_like(vectors)), torch.where(valid, length, 0)


def bend(vertices: Tensor, faces: Tensor, sides: Tensor) -> Tensor:
    """Return the area-weighted mean of 1 - cos across the edges."""
    normals, area = unit(face_cross(vertices, faces))
    first, second = sides[:, 0].long(), sides[:, 1].long()
    cosine = (normals.index_select(0, first) * normals.index_select(0, second)).sum(-1)
    with torch.no_grad():
        weight = torch.minimum(area[first, 0], area[second, 0])
        weight = weight / weight.sum().clamp_min(1e-30)
    return (weight * (1 - cosine)).sum()


def rough(vertices: Tensor, faces: Tensor, edges: Tensor) -> Tensor:
    """Mean squared normal part of the umbrella vectors, in mean edge lengths."""
    delta = umbrella(vertices, edges)
    if not len(edges):
        return delta.sum()  # 0
    with torch.no_grad():
        cross = face_cross(vertices, faces).repeat(3, 1)
        normals, _ = unit(torch.zeros_like(vertices).index_add(0, faces.T.reshape(-1).long(), cross))
    return (delta * normals).sum(-1).square().mean()


def umbrella(vertices: Tensor, edges: Tensor) -> Tensor:
    """Return the step from every vertex to the mean of its neighbours, [V, 3], in mean edge lengths (held constant)."""
    a, b = edges[:, 0].long(), edges[:, 1].long()
    start, end = vertices.index_select(0, a), vertices.index_select(0, b)
    with torch.no_grad():
        one = torch.ones(len(edges), dtype=vertices.dtype, device=vertices.device)
        degree = torch.zeros(len(vertices), dtype=vertices.dtype, device=vertices.device)
        degree = degree.index_add(0, a, one).index_add(0, b, one).clamp_min(1)
        length = ((end - start).norm(dim=-1).sum() / max(len(edges), 1)).clamp_min(1e-12)
    total = torch.zeros_like(vertices).index_add(0, a, end - start).index_add(0, b, start - end)
    return total / (degree[:, None] * length)
