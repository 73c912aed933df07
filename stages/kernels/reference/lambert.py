"""The torch twin of Lambertian shading: its definition, differentiable by autograd, on any device and in any float."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

LIGHT_MIN = 1e-12  # a light nearer than this shines from nowhere


def lambert(
    albedo: Tensor, normals: Tensor, points: Tensor, light: Tensor, ambient: float, diffuse: float, shortest: float
) -> Tensor:
    """Return shaded colours [N, 3]; see lambert.py."""
    unit = normalize(normals, dim=-1, eps=shortest) if shortest else normals
    towards = normalize(light - points, dim=-1, eps=LIGHT_MIN)
    cosine = (unit * towards).sum(-1, keepdim=True).clamp_min(0)
    return albedo * (ambient + diffuse * cosine)
