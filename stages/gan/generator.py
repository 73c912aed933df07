"""The generator: two latents, two styles, two tri-planes; signed distances and offsets on a lattice, colours at points.

    z_geo, z_tex -> mapping -> w_geo, w_tex
    w_geo modulates a convolutional network, whose features both styles read: w_geo as planes of geometry, w_tex as
    planes of texture; a point's feature is the sum of its three bilinear samples
    signed distance and offset at lattice vertices by a modulated network of w_geo, colour at points by one of w_tex
Letters: B shapes, C channels, S side of a plane, N lattice vertices, P points, R cells of the lattice. Planes are
[B, 3, C, S, S] in the order XY, YZ, XZ; the first letter runs along columns, the second along rows; texel centres of
the border lie on the box.
Source: GET3D (arXiv 2209.11163) sec. 3.1 and the improved generator of its appendix. Otherwise than there: one hidden
layer tells signed distance and offset together; the signed distance begins as a ball's; no noise is added; colours go
through a sigmoid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.gan.layers import Mapping, ModulatedConv, lrelu
from stages.gan.plane_sums import values_at
from stages.gan.tets import BOX, TetGrid

BALL, SLOPE = 0.45, 6.0  # radius of the first shape, and how fast its signed distance grows, per world length
QUIET = 0.2  # of what the network says of the lattice, so that the first shapes are near that ball
BASE = 4  # side of the first, constant picture
AXES = ((0, 1), (1, 2), (0, 2))  # column and row axis of XY, YZ, XZ


@dataclass(frozen=True)
class GanSizes:
    """The sizes of one class's generator.

    Args:
        latent: numbers of z. width: of w. layers: of a mapping network.
        channels: of the convolutions at 4, 8, ... pixels; the last are those of the planes' side.
        features: C of a plane, of geometry and of texture.
        hidden: width of the networks that read them.
        cells: R of the lattice.
    """

    latent: int = 64
    width: int = 64
    layers: int = 2
    channels: tuple[int, ...] = (64, 64, 32, 24)
    features: int = 16
    hidden: int = 16
    cells: int = 24


@dataclass(frozen=True)
class Planes:
    """What a shape is made of: planes of geometry and texture [B, 3, C, S, S], and the styles [B, W] that read them."""

    geometry: Tensor
    texture: Tensor
    w_geo: Tensor
    w_tex: Tensor


class Generator(nn.Module):
    """The generator of one class."""

    def __init__(self, sizes: GanSizes) -> None:
        super().__init__()
        self.sizes, w = sizes, sizes.width
        self.map_geo = Mapping(sizes.latent, w, sizes.layers)
        self.map_tex = Mapping(sizes.latent, w, sizes.layers)
        self.start = nn.Parameter(torch.randn(sizes.channels[0], BASE, BASE))
        pairs = list(zip(sizes.channels[:1] + sizes.channels, sizes.channels, strict=False))
        self.first = nn.ModuleList(ModulatedConv(a, b, 3, w) for a, b in pairs)
        self.second = nn.ModuleList(ModulatedConv(b, b, 3, w) for _, b in pairs[1:-1])  # the last has one
        planes = 3 * sizes.features
        self.to_geo = nn.ModuleList(ModulatedConv(b, planes, 1, w, demodulate=False) for b in sizes.channels)
        self.to_tex = nn.ModuleList(ModulatedConv(b, planes, 1, w, demodulate=False) for b in sizes.channels)
        self.geo_hidden = ModulatedConv(sizes.features, sizes.hidden, 1, w)
        self.geo_out = ModulatedConv(sizes.hidden, 4, 1, w, demodulate=False)
        self.tex_hidden = ModulatedConv(sizes.features, 2 * sizes.hidden, 1, w)
        self.tex_features = ModulatedConv(2 * sizes.hidden, sizes.hidden, 1, w)
        self.tex_out = ModulatedConv(sizes.hidden, 3, 1, w, demodulate=False)

    def planes(self, w_geo: Tensor, w_tex: Tensor) -> Planes:
        """Return the planes of styles [B, W]."""
        x = self.start.expand(len(w_geo), -1, -1, -1)
        geo = tex = None
        for k, first in enumerate(self.first):
            if k:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = lrelu(first(x, w_geo))
            if 0 < k <= len(self.second):
                x = lrelu(self.second[k - 1](x, w_geo))
            more_geo, more_tex = self.to_geo[k](x, w_geo).float(), self.to_tex[k](x, w_tex).float()
            geo = more_geo if geo is None else _doubled(geo) + more_geo
            tex = more_tex if tex is None else _doubled(tex) + more_tex
        return Planes(geo.unflatten(1, (3, -1)), tex.unflatten(1, (3, -1)), w_geo, w_tex)

    def lattice_values(self, planes: Planes, grid: TetGrid) -> tuple[Tensor, Tensor]:
        """Return signed distances [B, N] and offsets [B, N, 3] at the lattice's vertices.

        The hidden layer is linear before its leaky ReLU, so it is asked on the planes, which are then read at every
        half cell, and its three parts are added up at the lattice's vertices.
        """
        batch, cells = len(planes.geometry), grid.cells
        matrices = self.geo_hidden.matrices(planes.w_geo).repeat_interleave(3, 0)  # [3 B, C, H]
        hidden = torch.bmm(planes.geometry.flatten(3).flatten(0, 1).transpose(1, 2), matrices)  # [3 B, S S, H]
        hidden = hidden.unflatten(1, planes.geometry.shape[-2:]).permute(0, 3, 1, 2)
        hidden = F.interpolate(hidden, (2 * cells + 1,) * 2, mode="bilinear", align_corners=True)
        rows = hidden.permute(0, 2, 3, 1).unflatten(0, (batch, 3))  # [B, 3, row, column, H]
        values = values_at(rows, self.geo_hidden.bias, self.geo_out.matrices(planes.w_geo), grid.coordinates)
        values = QUIET * (values + self.geo_out.bias)
        ball = SLOPE * (grid.places.norm(dim=1) - BALL)
        return grid.closed(values[..., 0] + ball), values[..., 1:] / QUIET

    def colours(self, planes: Planes, points: Tensor, owner: Tensor) -> Tensor:
        """Return sRGB colours [P, 3] in [0, 1] at points [P, 3] of the shapes `owner` [P]."""
        features = features_at(planes.texture, points, owner)
        for layer in (self.tex_hidden, self.tex_features):
            features = lrelu(_per_shape(features, layer, planes.w_tex, owner))
        return torch.sigmoid(_per_shape(features, self.tex_out, planes.w_tex, owner))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _per_shape(x: Tensor, layer: ModulatedConv, w: Tensor, owner: Tensor) -> Tensor:
    """A layer of one pixel for points [P, C], each under the style of its shape; points of a shape stand together."""
    counts = torch.bincount(owner, minlength=len(w)).tolist()
    parts = [part @ matrix for part, matrix in zip(x.split(counts), layer.matrices(w), strict=True)]
    return torch.cat(parts) + layer.bias


def features_at(planes: Tensor, points: Tensor, owner: Tensor) -> Tensor:
    """Return the sum of three bilinear samples [P, C] of planes [B, 3, C, S, S] at points, cut at the box.

    Args:
        points: [P, 3] world. owner: [P] which shape's.
    Differentiable in planes and points.
    """
    channels, size = planes.shape[2], planes.shape[-1]
    table = planes.permute(0, 1, 3, 4, 2).reshape(-1, channels)
    scaled = ((points / BOX).clamp(-1, 1) + 1) * ((size - 1) / 2)
    low = scaled.detach().floor().clamp(0, size - 2)
    share, low = scaled - low, low.long()
    indices, weights = [], []
    for plane, (i, j) in enumerate(AXES):
        start = (owner * 3 + plane) * size * size + low[:, j] * size + low[:, i]
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            indices.append(start + row * size + column)
            across = share[:, i] if column else 1 - share[:, i]
            along = share[:, j] if row else 1 - share[:, j]
            weights.append(across * along)
    return F.embedding_bag(torch.stack(indices, 1), table, per_sample_weights=torch.stack(weights, 1), mode="sum")
