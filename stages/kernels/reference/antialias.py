"""The torch twin of the silhouette antialiasing: its definition, differentiable, on any device.

For every two neighbouring pixels that show different triangles: walk over the surface from the nearer one's triangle
along the segment between the pixel centres; if the first silhouette edge met lies on the segment, it splits it, and
the pixel that it cuts into takes its share of the other's colour. A pair side by side answers to edges steeper than
45 degrees and a pair one above the other to the rest, so every crossing counts once and the summed coverage of a
straight edge is its exact area.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.kernels.reference.raster import screen

STEPS_MAX = 64  # triangles walked over within one pixel


def edge_topology(triangles: Tensor, vertices: int) -> Tensor:
    """Opposite half-edge [F, 3] int32 of every half-edge, -1 without exactly one; see kernels/raster.py."""
    long = triangles.long()
    start, stop = long.roll(-1, 1).reshape(-1), long.roll(-2, 1).reshape(-1)  # half-edge 3 f + k
    key = torch.minimum(start, stop) * vertices + torch.maximum(start, stop)
    key, order = key.sort(stable=True)
    count = torch.unique_consecutive(key, return_counts=True)[1]
    first = (count.cumsum(0) - count)[count == 2]
    e, o = order[first], order[first + 1]
    e, o = e[e // 3 != o // 3], o[e // 3 != o // 3]
    opposite = torch.full_like(order, -1)
    opposite[e], opposite[o] = o, e
    return opposite.reshape(-1, 3).int()


def silhouettes(points: Tensor, drawable: Tensor, triangles: Tensor, opposite: Tensor) -> Tensor:
    """Say whether the surface ends or turns away at each half-edge [F, 3] of one view."""
    a, b, c = points[triangles.long()][..., :2].unbind(1)
    front = ((b - a)[:, 0] * (c - a)[:, 1] - (c - a)[:, 0] * (b - a)[:, 1]) > 0  # [F]
    drawable_faces = drawable[triangles.long()].all(1)
    other = opposite.long().clamp_min(0)
    start = triangles.roll(-1, 1)  # [F, 3] where half-edges begin
    against = start != start.reshape(-1)[other]
    turns = (front[:, None] != front[other // 3]) == against
    return (opposite < 0) | ~drawable_faces[other // 3] | turns


def crossings(clip: Tensor, rast: Tensor, triangles: Tensor, opposite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split pairs of one view: pixels [N, 2], edge ends [N, 2], and weight [N], differentiable in clip [V, 4].

    The weight is how far the crossing lies beyond the border between the two pixels, towards the second.
    """
    height, width, _ = rast.shape
    drawable = screen(clip.detach().double(), height, width)[1]
    safe_clip = torch.where(drawable[:, None], clip.double(), 1.0)  # else nan would flow back
    points, _ = screen(safe_clip, height, width)
    edge = silhouettes(points.detach(), drawable, triangles, opposite)
    walks = [_walk(points, edge, rast, triangles.long(), opposite.long(), axis) for axis in (0, 1)]
    return tuple(torch.cat(parts) for parts in zip(*walks, strict=True))


def _walk(points: Tensor, edge: Tensor, rast: Tensor, triangles: Tensor, opposite: Tensor, along: int):
    height, width, _ = rast.shape
    across = 1 - along
    pixel = torch.arange(height * width, device=rast.device).reshape(height, width)
    p, q = (pixel[:, :-1], pixel[:, 1:]) if along == 0 else (pixel[:-1], pixel[1:])
    p, q = p.reshape(-1), q.reshape(-1)
    depth, ids = rast[..., 2].detach().reshape(-1), rast[..., 3].detach().reshape(-1).long()
    differ = ids[p] != ids[q]
    p, q = p[differ], q[differ]
    ahead = (ids[q] == 0) | ((ids[p] > 0) & (depth[p] <= depth[q]))  # the first pixel is the nearer one
    f = torch.where(ahead, ids[p], ids[q]) - 1
    row, column = (p // width).double() + 0.5, (p % width).double() + 0.5
    here, line = (column, row) if along == 0 else (row, column)
    direction = torch.where(ahead, 1.0, -1.0).double()
    origin = here + (~ahead).double()
    entry = torch.full_like(f, -1)
    live = torch.arange(len(f), device=f.device)
    hits = []
    flat = points.detach()
    for _ in range(STEPS_MAX):
        if not len(live):
            break
        corner = flat[triangles[f[live]]]  # [L, 3, 3]
        i, j = corner.roll(-1, 1), corner.roll(-2, 1)
        crosses = (i[..., across] > line[live, None]) != (j[..., across] > line[live, None])
        crosses &= torch.arange(3, device=f.device) != entry[live, None]
        at = _crossing(i, j, line[live, None], along, across)
        t = torch.where(crosses, direction[live, None] * (at - origin[live, None]), -torch.inf)
        t, k = t.max(1)
        inside = (t <= 1) & (t > -torch.inf)
        live, k = live[inside], k[inside]
        ends = edge[f[live], k]
        hits.append((live[ends], 3 * f[live][ends] + k[ends]))
        live, k = live[~ends], k[~ends]
        o = opposite[f[live], k]
        f[live], entry[live] = o // 3, o % 3
    pair, half = (torch.cat(parts) for parts in zip(*hits, strict=True)) if hits else (live, live)
    ends = torch.stack([triangles[half // 3, (half + 1) % 3], triangles[half // 3, (half + 2) % 3]], -1)
    i, j = points[ends[:, 0]], points[ends[:, 1]]
    rise = (j - i).detach().abs()
    owned = rise[:, 1] >= rise[:, 0] if along == 0 else rise[:, 1] < rise[:, 0]
    weights = _crossing(i[owned], j[owned], line[pair][owned], along, across) - here[pair][owned] - 0.5
    split = weights.detach().abs() <= 0.5
    pair = pair[owned][split]
    return torch.stack([p[pair], q[pair]], -1), ends[owned][split], weights[split]


def _crossing(i: Tensor, j: Tensor, line: Tensor, along: int, across: int) -> Tensor:
    rise = j[..., across] - i[..., across]
    slope = (j[..., along] - i[..., along]) / torch.where(rise == 0, 1, rise)
    return i[..., along] + (line - i[..., across]) * slope


def antialias(colour: Tensor, rast: Tensor, clip: Tensor, triangles: Tensor, opposite: Tensor) -> Tensor:
    """Colour with silhouettes blended; see kernels/raster.py."""
    views = []
    for c, r, p in zip(colour, rast, clip, strict=True):
        pixels, _, weights = crossings(p, r, triangles, opposite)
        flat = c.reshape(-1, c.shape[-1])
        onward = weights.detach() > 0
        to = torch.where(onward, pixels[:, 1], pixels[:, 0])
        other = torch.where(onward, pixels[:, 0], pixels[:, 1])
        share = weights.abs().to(c.dtype)[:, None]
        change = share * (flat.index_select(0, other) - flat.index_select(0, to))
        views.append(flat.index_add(0, to, change).reshape(c.shape))
    return torch.stack(views) if views else colour
