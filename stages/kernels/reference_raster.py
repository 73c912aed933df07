"""The torch twin of the rasteriser: its definition, differentiable by autograd, on any device, float32 or float64.

Letters: B views, V vertices, F triangles, H rows, W columns, C channels. Screen coordinates are pixels, x right and
y down, pixel centres at half integers; they and the edge functions are float64 whatever the dtype of `clip`.
"""

from __future__ import annotations

import torch
from torch import Tensor

W_MIN = 1e-6  # a vertex nearer to the eye plane than this makes its triangles undrawable
PIXELS_MAX = 1e12  # so does one that projects this far out
AREA_MIN = 1e-8  # square pixels; slimmer triangles are left out
PAIRS = 1 << 22  # (triangle, pixel) pairs tested at once


def rasterise(clip: Tensor, triangles: Tensor, height: int, width: int) -> Tensor:
    """Nearest triangle, perspective-correct barycentrics and z/w at each pixel centre; see kernels/raster.py."""
    planes = [_nearest(c.detach().double(), triangles.long(), height, width) for c in clip]
    ids, depth = (torch.stack(p) for p in zip(*planes, strict=True))  # [B, H, W]
    u, v = barycentrics(clip, triangles, ids)
    return torch.stack([u, v, depth.to(clip.dtype), (ids + 1).to(clip.dtype)], -1)


def _nearest(clip: Tensor, triangles: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Triangle index (-1: none) and z/w, both [H, W], by testing every pixel of every triangle's bounding box."""
    device = clip.device
    depth = torch.full((height * width,), torch.inf, dtype=torch.float64, device=device)
    ids = torch.full((height * width,), -1, dtype=torch.long, device=device)
    x = (clip[:, 0] / clip[:, 3] * 0.5 + 0.5) * width
    y = (0.5 - clip[:, 1] / clip[:, 3] * 0.5) * height
    drawable = (clip[:, 3] > W_MIN) & (x.abs() < PIXELS_MAX) & (y.abs() < PIXELS_MAX)
    kept = drawable[triangles].all(1).nonzero()[:, 0]
    x, y, z = (s[triangles[kept]] for s in (x, y, clip[:, 2] / clip[:, 3]))  # [K, 3]
    left = (x.amin(1).clamp(0, width) - 0.5).ceil().long()
    right = (x.amax(1).clamp(0, width) - 0.5).floor().long() + 1
    top = (y.amin(1).clamp(0, height) - 0.5).ceil().long()
    bottom = (y.amax(1).clamp(0, height) - 0.5).floor().long() + 1
    area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])
    columns, lines = (right - left).clamp_min(0), (bottom - top).clamp_min(0)
    count = columns * lines * (area.abs() > AREA_MIN)
    edges = torch.stack([torch.stack(_edge(x, y, (k + 1) % 3, (k + 2) % 3), -1) for k in range(3)], 1)  # [K, 3, 3]
    edges = edges * area.sign()[:, None, None]
    for part in _chunks(count):
        owner = torch.repeat_interleave(part, count[part])  # [P] which kept triangle
        rank = torch.arange(len(owner), device=device) - torch.repeat_interleave(
            count[part].cumsum(0) - count[part], count[part]
        )
        column, row = left[owner] + rank % columns[owner], top[owner] + rank // columns[owner]
        weight = edges[owner, :, 0] * (column + 0.5)[:, None] + (
            edges[owner, :, 1] * (row + 0.5)[:, None] + edges[owner, :, 2]
        )  # [P, 3]
        value = weight[:, 0] * z[owner, 0] + weight[:, 1] * z[owner, 1] + weight[:, 2] * z[owner, 2]
        value = value * (1.0 / area[owner].abs())
        inside = (weight >= 0).all(1) & (value >= -1) & (value <= 1)
        owner, pixel, value = owner[inside], (row * width + column)[inside], value[inside]
        nearest = depth.scatter_reduce(0, pixel, value, "amin")
        ids[nearest < depth] = len(triangles)  # a nearer one came: whatever was there has lost
        won = value == nearest[pixel]
        first = torch.where(ids < 0, len(triangles), ids).scatter_reduce(0, pixel[won], kept[owner[won]], "amin")
        ids, depth = torch.where(first == len(triangles), -1, first), nearest
    depth = torch.where(ids < 0, 0.0, depth)
    return ids.reshape(height, width), depth.reshape(height, width)


def _edge(x: Tensor, y: Tensor, a: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of A x + (B y + C) along the edge a-b, always taken from the end with the smaller (x, y)."""
    swap = (x[:, a] > x[:, b]) | ((x[:, a] == x[:, b]) & (y[:, a] > y[:, b]))
    ax, bx = torch.where(swap, x[:, b], x[:, a]), torch.where(swap, x[:, a], x[:, b])
    ay, by = torch.where(swap, y[:, b], y[:, a]), torch.where(swap, y[:, a], y[:, b])
    sign = 1.0 - 2.0 * swap
    ea, eb = -(by - ay), bx - ax
    return sign * ea, sign * eb, sign * -(ea * ax + eb * ay)


def _chunks(count: Tensor) -> list[Tensor]:
    """Runs of consecutive indices whose counts sum to about PAIRS, leaving out the empty ones."""
    used = count.nonzero()[:, 0]
    if not len(used):
        return []
    batch = (count[used].cumsum(0) - 1) // PAIRS
    return list(torch.split(used, torch.unique_consecutive(batch, return_counts=True)[1].tolist()))


def barycentrics(clip: Tensor, triangles: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """u, v [B, H, W] of triangle `ids` [B, H, W] (-1: none, gives 0) on the pixel's ray; differentiable in clip."""
    _, height, width = ids.shape
    view, row, column = (ids >= 0).nonzero(as_tuple=True)
    corners = triangles.long()[ids[view, row, column]]  # [N, 3]
    p = clip[view[:, None], corners].double()  # [N, 3, 4]
    fx = (2 * (column.double() + 0.5) / width - 1)[:, None]
    fy = (1 - 2 * (row.double() + 0.5) / height)[:, None]
    x, y = p[..., 0] - fx * p[..., 3], p[..., 1] - fy * p[..., 3]  # [N, 3]
    d = torch.stack([x[:, (k + 1) % 3] * y[:, (k + 2) % 3] - y[:, (k + 1) % 3] * x[:, (k + 2) % 3] for k in range(3)], 1)
    uv = (d[:, :2] / d.sum(1, keepdim=True)).to(clip.dtype)
    planes = torch.zeros(*ids.shape, 2, dtype=clip.dtype, device=clip.device)
    planes = planes.index_put((view, row, column), uv)
    return planes[..., 0], planes[..., 1]


def interpolate(attributes: Tensor, rast: Tensor, triangles: Tensor) -> Tensor:
    """Barycentric mean of the corner attributes [B or 1, V, C]; zero where no triangle is."""
    view, row, column = (rast[..., 3] > 0).nonzero(as_tuple=True)
    at = rast[view, row, column]  # [N, 4]
    corners = triangles.long()[at[:, 3].long() - 1]
    owner = view if attributes.shape[0] > 1 else torch.zeros_like(view)
    source = attributes[owner[:, None], corners]  # [N, 3, C]
    weight = torch.stack([at[:, 0], at[:, 1], 1 - at[:, 0] - at[:, 1]], 1)
    out = torch.zeros(*rast.shape[:3], attributes.shape[-1], dtype=attributes.dtype, device=attributes.device)
    return out.index_put((view, row, column), (weight[..., None] * source).sum(1))
