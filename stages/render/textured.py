"""The material of a textured mesh: a colour map and a tangent-space normal map, both differentiable.

Tangents follow from texture coordinates as in Lengyel's method (Foundations of Game Engine Development 2, sec. 7.5):
each face's direction of growing u, weighted by its area in the texture, summed at the texture's vertices and made
square to the normal; the bitangent is n x t, turned round where a chart is mirrored. Maps have row 0 at the top.
Letters: T texture coordinates, F faces, N covered pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from stages.errors import check_shape
from stages.kernels.raster import interpolate, texture
from stages.kernels.srgb import srgb_to_linear
from stages.render.pixels import take


class TextureMaterial:
    """A :class:`stages.render.raster.Material`.

    Args:
        vertices: [V, 3], for the tangents.
        faces: [F, 3] int32.
        uv: [T, 2], v up.
        uv_faces: [F, 3] int32 into uv.
        colour_map: [H, W, 3] sRGB in [0, 1].
        normal_map: [H, W, 3], x along u, y along v, z outwards; need not be unit; None: the surface's own normals.
    """

    def __init__(
        self,
        vertices: Tensor,
        faces: Tensor,
        uv: Tensor,
        uv_faces: Tensor,
        colour_map: Tensor,
        normal_map: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        check_shape("uv", uv, (None, 2))
        check_shape("uv_faces", uv_faces, (len(faces), 3))
        check_shape("colour_map", colour_map, (None, None, 3))
        self.uv, self.uv_faces, self.backend = uv, uv_faces, backend
        self.maps, self.attributes = colour_map, uv
        if normal_map is not None:
            check_shape("normal_map", normal_map, tuple(colour_map.shape))
            self.maps = torch.cat([colour_map, normal_map], -1)
            along, self.handedness = tangents(vertices, faces, uv, uv_faces)
            self.attributes = torch.cat([uv, along], -1)

    def at(self, rast: Tensor, covered: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        """Linear colours and normals [N, 3] of the covered pixels; differentiable in maps, vertices and normals."""
        if len(covered) == 0:
            return normals, normals
        row = take(rast, covered)[None, None]
        planes = interpolate(self.attributes, row, self.uv_faces, backend=self.backend)[0, 0]
        looked_up = texture(self.maps, planes[:, :2].contiguous(), backend=self.backend)
        colour = srgb_to_linear(looked_up[:, :3])
        if looked_up.shape[1] == 3:
            return colour, normals
        triangle = row[0, 0, :, 3].detach().long() - 1
        along = planes[:, 2:]
        along = normalize(along - normals * (along * normals).sum(-1, keepdim=True), dim=-1, eps=1e-8)
        across = torch.linalg.cross(normals, along) * self.handedness[triangle][:, None]
        x, y, z = looked_up[:, 3:].split(1, -1)
        return colour, normalize(x * along + y * across + z * normals, dim=-1, eps=1e-8)


def tangents(vertices: Tensor, faces: Tensor, uv: Tensor, uv_faces: Tensor) -> tuple[Tensor, Tensor]:
    """Return tangents at the texture's vertices [T, 3], unit but not square to a normal, and each face's handedness.

    Tangents are directions of growing u; handedness [F] is -1 where the chart is mirrored, else +1. Differentiable in
    the vertices.
    """
    p = vertices.index_select(0, faces.reshape(-1).long()).view(-1, 3, 3)
    q = uv.index_select(0, uv_faces.reshape(-1).long()).view(-1, 3, 2)
    edge, other = p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]
    (du, dv), (su, sv) = (q[:, 1] - q[:, 0]).split(1, -1), (q[:, 2] - q[:, 0]).split(1, -1)
    handedness = torch.where(du * sv - su * dv < 0, -1.0, 1.0).to(vertices.dtype)  # [F, 1]
    along = normalize((edge * sv - other * dv) * handedness, dim=-1, eps=1e-20)
    along = along * (du * sv - su * dv).abs()
    total = torch.zeros(len(uv), 3, dtype=vertices.dtype, device=vertices.device)
    total = total.index_add(0, uv_faces.T.reshape(-1).long(), along.repeat(3, 1))
    return normalize(total, dim=-1, eps=1e-20), handedness[:, 0]


def blurred_maps(maps: Tensor, kernel: int, sigma: float) -> Tensor:
    """Blur maps [H, W, C] by a Gaussian of `kernel` (odd) texels and deviation `sigma`, mirrored at the border.

    CLIP-Mesh's low-pass filter against speckles.
    """
    if kernel == 1 or sigma == 0:
        return maps
    x = torch.arange(kernel, dtype=torch.float64) - kernel // 2
    weights = torch.exp(-0.5 * (x / sigma).square())
    weights = (weights / weights.sum()).tolist()
    height, width, reach = *maps.shape[:2], kernel // 2
    padded = torch.nn.functional.pad(maps.permute(2, 0, 1), (reach, reach, reach, reach), mode="reflect")
    padded = padded.permute(1, 2, 0)
    # Sums of shifted maps: forward and backward in a fifth of the time of torch's convolutions (11 ms, not 58, for
    # 256 x 256 x 6 and 5 texels on one core).
    rows = sum(weight * padded[k : k + height] for k, weight in enumerate(weights))
    return sum(weight * rows[:, k : k + width] for k, weight in enumerate(weights)).contiguous()
