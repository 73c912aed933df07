"""Plain-torch definition of the hash-grid ops; the truth that every fast backend is tested against.

Source: Mueller et al., Instant NGP (2022), sec. 3 and eq. 4; trilinear interpolation, dense levels where they fit.
Letters: N points, L levels, F features per level, T table rows over all levels, corner = one of the 8 of a cell.
Level l has `resolution` cells a side, so `resolution + 1` vertices a side, and rows offsets[l] .. offsets[l + 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

PRIME_Y, PRIME_Z = 2654435761, 805459861  # Instant NGP eq. 4; the factor of x is 1


def corners(points: Tensor, level: int, spec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the eight table rows around each point at one level, and the trilinear weights with their slopes.

    A point that is not finite lies in cell 0 with fractions of nan, so that what is made of it is nan.
    Returns: rows [N, 8] int64; the fraction within the cell [N, 3]; the cell corner bits [8, 3];
        inside [N, 3], 1 where the clamped coordinate still moves with the point.
    """
    resolution, offset = spec.resolutions[level], spec.offsets[level]
    nan = (0 * points).sum(-1, keepdim=True)  # [N, 1], nan or 0
    scaled = (points.clamp(0, 1) + nan) * resolution  # [N, 3]
    cell = scaled.detach().nan_to_num(0.0).floor().clamp(max=resolution - 1)
    fraction = scaled - cell
    bits = torch.tensor([[c & 1, c >> 1 & 1, c >> 2] for c in range(8)], device=points.device)  # [8, 3]
    x, y, z = (cell.long()[:, None] + bits).unbind(-1)  # [N, 8] each
    side = resolution + 1
    if spec.dense[level]:
        index = x + y * side + z * side * side
    else:
        index = (x ^ (y * PRIME_Y) ^ (z * PRIME_Z)) & ((1 << spec.log2_table) - 1)
    inside = ((points >= 0) & (points <= 1)).to(points.dtype)
    return offset + index, fraction, bits, inside


def hash_encode(points: Tensor, table: Tensor, spec) -> Tensor:
    """Interpolate the features of every level side by side, [N, L * F]; differentiable in points and table."""
    features = []
    for level in range(spec.levels):
        rows, fraction, bits, _ = corners(points, level, spec)
        weights = torch.where(bits.bool(), fraction[:, None], 1 - fraction[:, None]).prod(-1)  # [N, 8]
        features.append((weights[..., None] * table[rows]).sum(1))  # [N, F]
    return torch.cat(features, -1)


def hash_gradient(points: Tensor, table: Tensor, spec, g: Tensor) -> Tensor:
    """Product J^T g [N, 3] of the encoding's Jacobian in the points with g [N, L * F].

    Differentiable in table and g. Not differentiable in: points (the weights are taken as constants).
    """
    points = points.detach()
    total = torch.zeros_like(points)
    for level in range(spec.levels):
        rows, fraction, bits, inside = corners(points, level, spec)
        g_level = g[:, level * spec.features : (level + 1) * spec.features]  # [N, F]
        value = (table[rows] * g_level[:, None]).sum(-1)  # [N, 8]
        factors = torch.where(bits.bool(), fraction[:, None], 1 - fraction[:, None])  # [N, 8, 3]
        sign = (2 * bits - 1).to(points.dtype)  # [8, 3]
        slopes = torch.stack(
            [
                sign[:, 0] * factors[..., 1] * factors[..., 2],
                sign[:, 1] * factors[..., 0] * factors[..., 2],
                sign[:, 2] * factors[..., 0] * factors[..., 1],
            ],
            -1,
        )  # [N, 8, 3]
        total = total + inside * spec.resolutions[level] * (slopes * value[..., None]).sum(1)
    return total
