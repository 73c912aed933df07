"""The torch twin of the rasteriser: its definition, differentiable by autograd, on any device, float32 or float64.

Letters: B views, V vertices, F triangles, H rows, W columns, C channels. Screen coordinates are pixels, x right and
y down, pixel centres at half integers; they and the edge functions are float64 whatever the dtype of `clip`.
"""

from __future__ import annotations

import torch
from torch import Tensor

W_MIN = 1e-6  # a vertex nearer to the eye plane than this makes its triangles undrawable
PIXELS_MAX = 1e12  # so does one that projects this far out: its edges would be off by more than 1e-4 pixels
AREA_MIN = 1e-8  # square pixels; slimmer triangles hold no pixel centre that their neighbours do not hold too
NORMAL_SQUARE_MIN = 1e-24  # squared length of an area-weighted normal that still gives a direction
PAIRS = 1 << 22  # (triangle, pixel) pairs tested at once


def rasterise(clip: Tensor, triangles: Tensor, height: int, width: int) -> Tensor:
    """Nearest triangle, perspective-correct barycentrics and z/w at each pixel centre; see kernels/raster.py."""
    ids = torch.empty(len(clip), height, width, dtype=torch.long, device=clip.device)
    depth = torch.empty_like(ids, dtype=torch.float64)
    for b, view in enumerate(clip.detach().double()):
        ids[b], depth[b] = _nearest(view, triangles.long(), height, width)
    u, v = barycentrics(clip, triangles, ids)
    return torch.stack([u, v, depth.to(clip.dtype), (ids + 1).to(clip.dtype)], -1)


def screen(clip: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Screen coordinates [..., 3] (x right, y down in pixels, z/w) and whether a vertex can be drawn [...]."""
    w = clip[..., 3]
    x = (clip[..., 0] / w * 0.5 + 0.5) * width
    y = (0.5 - clip[..., 1] / w * 0.5) * height
    z = clip[..., 2] / w
    drawable = (w > W_MIN) & (x.abs() < PIXELS_MAX) & (y.abs() < PIXELS_MAX) & ~z.isnan()
    return torch.stack([x, y, z], -1), drawable


def _nearest(clip: Tensor, triangles: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Triangle index (-1: none) and z/w, both [H, W], by testing every pixel of every triangle's bounding box."""
    device = clip.device
    depth = torch.full((height * width,), torch.inf, dtype=torch.float64, device=device)
    ids = torch.full((height * width,), -1, dtype=torch.long, device=device)
    points, drawable = screen(clip, height, width)
    faces = drawable[triangles].all(1).nonzero()[:, 0]
    x, y, z = points[triangles[faces]].unbind(-1)  # [K, 3]
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
        owner = torch.repeat_interleave(part, count[part])  # [P] which drawable triangle
        before = count[part].cumsum(0) - count[part]
        rank = torch.arange(len(owner), device=device) - torch.repeat_interleave(before, count[part])
        column, row = left[owner] + rank % columns[owner], top[owner] + rank // columns[owner]
        weight = edges[owner, :, 0] * (column + 0.5)[:, None] + (
            edges[owner, :, 1] * (row + 0.5)[:, None] + edges[owner, :, 2]
        )  # [P, 3]
        value = weight[:, 0] * z[owner, 0] + weight[:, 1] * z[owner, 1] + weight[:, 2] * z[owner, 2]
        value = value * (1.0 / area[owner].abs())
        inside = (weight >= 0).all(1) & (value >= -1) & (value <= 1)
        owner, pixel, value = owner[inside], (row * width + column)[inside], value[inside]
        nearest = depth.scatter_reduce(0, pixel, value, "amin")
        ids[nearest < depth] = len(triangles)  # farther than a triangle of this part
        is_nearest = value == nearest[pixel]
        pixel, owner = pixel[is_nearest], owner[is_nearest]
        first = torch.where(ids < 0, len(triangles), ids).scatter_reduce(0, pixel, faces[owner], "amin")
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
    nonempty = count.nonzero()[:, 0]
    if not len(nonempty):
        return []
    batch = (count[nonempty].cumsum(0) - 1) // PAIRS
    return list(torch.split(nonempty, torch.unique_consecutive(batch, return_counts=True)[1].tolist()))


def barycentrics(clip: Tensor, triangles: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return u, v [B, H, W] of triangle `ids` [B, H, W] (-1: none, 0) on the pixel's ray; differentiable in clip."""
    _, height, width = ids.shape
    view, row, column = (ids >= 0).nonzero(as_tuple=True)
    corners = triangles.long()[ids[view, row, column]]  # [N, 3]
    p = clip[view[:, None], corners].double()  # [N, 3, 4]
    fx = (2 * (column.double() + 0.5) / width - 1)[:, None]
    fy = (1 - 2 * (row.double() + 0.5) / height)[:, None]
    x, y = p[..., 0] - fx * p[..., 3], p[..., 1] - fy * p[..., 3]  # [N, 3]
    d = x.roll(-1, 1) * y.roll(-2, 1) - y.roll(-1, 1) * x.roll(-2, 1)  # [N, 3]
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


def texture(image: Tensor, uv: Tensor) -> Tensor:
    """Bilinear look-up [..., C] in image [H, W, C] at uv [..., 2], v up, clamped to the edge texels' centres."""
    height, width, _ = image.shape
    x = (uv[..., 0].double() * width - 0.5).nan_to_num(0.0).clamp(0, width - 1)
    y = ((1 - uv[..., 1].double()) * height - 0.5).nan_to_num(0.0).clamp(0, height - 1)
    x0, y0 = x.detach().long().clamp(0, max(width - 2, 0)), y.detach().long().clamp(0, max(height - 2, 0))
    x1, y1 = (x0 + 1).clamp_max(width - 1), (y0 + 1).clamp_max(height - 1)
    sx, sy = (x - x0)[..., None], (y - y0)[..., None]
    top = image[y0, x0] * (1 - sx) + image[y0, x1] * sx
    bottom = image[y1, x0] * (1 - sx) + image[y1, x1] * sx
    return (top * (1 - sy) + bottom * sy).to(image.dtype)


def vertex_normals(vertices: Tensor, triangles: Tensor) -> Tensor:
    """Return area-weighted unit normals [V, 3]; +y, without gradient, where there is none."""
    corners = triangles.long().T.reshape(-1)  # [3 F]
    a, b, c = vertices.double().index_select(0, corners).reshape(3, -1, 3)
    face = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices, dtype=torch.float64).index_add(0, corners, face.repeat(3, 1))
    square = total.square().sum(-1, keepdim=True)
    valid = square > NORMAL_SQUARE_MIN
    up = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, device=vertices.device)
    return torch.where(valid, total * torch.where(valid, square, 1).rsqrt(), up).to(vertices.dtype)
