"""The networks of Point-E: a transformer over noisy points, and one that tells the signed distance to a cloud.

Points have no position but their own numbers, so permuting them permutes what the network says of them. What else it
is told stands before them as tokens: the time, a CLIP's embedding, the CLIP's grid of a picture, the low cloud.
Letters: B clouds, K points, D width.
Source: Point-E (arXiv 2212.08751) and its public code. Otherwise than there one network reads the embedding and the
grid, each left out in a share of the training, and the variance, which the sampler does not ask for, is not predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 6  # x y z r g b
SCALE = 0.25  # of the first weights


@dataclass(frozen=True)
class TransformerShape:
    """The sizes of a PointTransformer.

    Args:
        width, layers, heads: of the blocks.
        vector: numbers of a CLIP's embedding. grid: of a token of its vision model.
        low: whether it is told a low cloud.
    """

    width: int
    layers: int
    heads: int
    vector: int
    grid: int
    low: bool = False


@dataclass(frozen=True)
class SdfShape:
    """The sizes of an SdfNetwork: width, heads, blocks over the cloud and of each asked point, octaves of places."""

    width: int
    heads: int
    encoder: int
    decoder: int
    octaves: int = 4


def _linear(inputs: int, outputs: int, width: int) -> nn.Linear:
    """A layer as Point-E begins them, by the width of the blocks."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=SCALE / math.sqrt(width))
    nn.init.zeros_(layer.bias)
    return layer


def _last(width: int, outputs: int) -> nn.Linear:
    """A layer that says nothing until it is trained."""
    layer = nn.Linear(width, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class _Attention(nn.Module):
    """Attention of tokens to others, or to themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = (
            _linear(width, width, width),
            _linear(width, 2 * width, width),
            _linear(width, width, width),
        )

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        k, v = self.kv(other).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """A pre-norm block; of a token alone, where `others` are given: these are asked, and nothing else."""

    def __init__(self, width: int, heads: int, asks_others: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_others = nn.LayerNorm(width) if asks_others else None
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(_linear(width, 4 * width, width), nn.GELU(), _linear(4 * width, width, width))

    def forward(self, x: Tensor, others: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h if others is None else self.norm_others(others))
        return x + self.mlp(self.norm2(x))


class PointTransformer(nn.Module):
    """A network from noisy points, a time and conditions to the noise in each point."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.shape, width = shape, shape.width
        self.time = nn.Sequential(_linear(width, 4 * width, width), nn.GELU(), _linear(4 * width, width, width))
        self.vector = _linear(shape.vector, width, width)
        self.grid = nn.Sequential(nn.LayerNorm(shape.grid), _linear(shape.grid, width, width))
        self.points = _linear(CHANNELS, width, width)
        self.low = _linear(CHANNELS, width, width) if shape.low else None
        self.begin = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_Block(width, shape.heads) for _ in range(shape.layers))
        self.end = nn.LayerNorm(width)
        self.out = _last(width, CHANNELS)

    def forward(self, points: Tensor, t: Tensor, vector: Tensor, grid: Tensor, low: Tensor | None = None) -> Tensor:
        """Return the noise [B, K, 6] of points [B, K, 6].

        Args:
            t: [B] steps of the schedule, with their fractions.
            vector: [B, V] a CLIP's embedding, length sqrt(V); zeros for none.
            grid: [B, L, G] a CLIP's tokens of a picture; zeros for none.
            low: [B, M, 6] the low cloud, of a network that is told one.
        """
        tokens = [
            self.time(_waves(t, self.shape.width).to(points))[:, None],
            self.vector(vector)[:, None],
            self.grid(grid),
        ]
        if self.low is not None:
            tokens.append(self.low(low))
        x = self.begin(torch.cat([*tokens, self.points(points)], 1))
        for block in self.blocks:
            x = block(x)
        return self.out(self.end(x[:, -points.shape[1] :]))


class SdfNetwork(nn.Module):
    """The signed distance to the surface that a cloud lies on, negative inside, at any point; colours are not read.

    Otherwise than in Point-E places are given with their sines and cosines, whose products tell which are near each
    other, for a network that has few steps to learn it in.
    """

    def __init__(self, shape: SdfShape) -> None:
        super().__init__()
        self.shape, width, inputs = shape, shape.width, 3 + 6 * shape.octaves
        self.points, self.queries = _linear(inputs, width, width), _linear(inputs, width, width)
        self.encoder = nn.ModuleList(_Block(width, shape.heads) for _ in range(shape.encoder))
        self.decoder = nn.ModuleList(_Block(width, shape.heads, True) for _ in range(shape.decoder))
        self.end = nn.Sequential(nn.LayerNorm(width), _last(width, 1))

    def encode(self, points: Tensor) -> Tensor:
        """Return what asked points attend to, [B, K, D], of points [B, K, 3] in a network's scale."""
        x = self.points(self._places(points))
        for block in self.encoder:
            x = block(x)
        return x

    def forward(self, code: Tensor, queries: Tensor) -> Tensor:
        """Return signed distances [B, Q] at queries [B, Q, 3], each for itself; code is of `encode`."""
        x = self.queries(self._places(queries))
        for block in self.decoder:
            x = block(x, code)
        return self.end(x)[..., 0]

    def _places(self, points: Tensor) -> Tensor:
        angles = [math.pi / 2 * 2**k * points for k in range(self.shape.octaves)]
        return torch.cat([points, *(wave(angle) for angle in angles for wave in (torch.sin, torch.cos))], -1)


def _waves(t: Tensor, width: int) -> Tensor:
    """Sinusoids [B, D] of steps [B]."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], -1)
