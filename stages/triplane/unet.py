"""The UNet over rolled-out tri-planes, with convolutions that are aware of the third dimension.

An ordinary convolution over a roll-out mixes what happens to stand beside each other. The 3D-aware one tells each plane
what the other two hold on the line behind each of its cells: their means along the axis that it does not have.
    A' = conv1[A, col(B), col(C)^T]    B' = conv2[col(A), B, row(C)]    C' = conv3[row(A)^T, row(B), C]
with A, B, C the planes XY, XZ, YZ, col(P) the mean over rows at each column, row(P) the mean over columns at each row,
both spread over the plane. It is the second convolution of each residual block at the highest resolution.
Source: Rodin (arXiv 2212.06135) sec. 3.2; width, depth and the words in the attention are ours.

Otherwise than there: a roll-out is unshuffled into patches first, since a CPU has to pay for it; its places have a
learned embedding, for planes look alike to a convolution; words join the keys and values of the attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8  # of the norms


@dataclass(frozen=True)
class UNetShape:
    """The sizes of a TriplaneUNet.

    Args:
        side: of the planes that it sees, cells.
        inputs, outputs: channels of the planes.
        patch: cells of a patch's side.
        widths: channels of each level, halved in size from one to the next.
        blocks: residual blocks of a level, one more on the way up.
        attention: levels with attention.
        condition: width of the vector that the normalisations are told; 0 for none.
        words: width of the words that attention sees; 0 for none.
    """

    side: int
    inputs: int
    outputs: int
    patch: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...] = ()
    condition: int = 0
    words: int = 0
    embedding: int = field(default=192)


class AwareConvolution(nn.Module):
    """The 3D-aware convolution of a roll-out [B, C, R, 3 R], 3 x 3, padded by zeros around each plane.

    The parts that are constant along an axis are convolved as lines, which gives the same numbers for a third of the
    work: along the constant axis the kernel is summed, over two of its three taps at the border.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.weight = nn.Parameter(torch.zeros(3, outputs, 3 * inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(3, outputs))

    def forward(self, rolled: Tensor) -> Tensor:
        a, b, c = rolled.chunk(3, -1)
        columns, rows = (lambda p: p.mean(-2)), (lambda p: p.mean(-1))  # a line along the columns, along the rows
        shares = (  # of each plane: itself, a line over its columns, one over its rows; where they stand in the weight
            (a, columns(b), columns(c), (0, 1, 2)),
            (b, columns(a), rows(c), (1, 0, 2)),
            (c, rows(a), rows(b), (2, 0, 1)),
        )
        out = []
        for weight, bias, (plane, over_columns, over_rows, order) in zip(self.weight, self.bias, shares, strict=True):
            parts = weight.split(self.inputs, 1)
            whole, first, second = (parts[k] for k in order)
            lines = _along(over_columns, first).transpose(-1, -2)  # constant along rows
            out.append(F.conv2d(plane, whole, bias, padding=1) + lines + _along(over_rows, second.transpose(-1, -2)))
        return torch.cat(out, -1)


def _along(line: Tensor, weight: Tensor) -> Tensor:
    """The convolution of a line spread over a plane, as [B, O, line, constant axis].

    Args:
        line: [B, C, R]. weight: [O, C, 3, 3], its last axis along the line, the one before along the constant axis.
    """
    outputs, size = weight.shape[0], line.shape[-1]
    middle = weight.sum(2)
    kernels = torch.cat([middle - weight[:, :, 0], middle, middle - weight[:, :, 2]])
    first, inner, last = F.conv1d(line, kernels, padding=1).split(outputs, 1)
    inner = inner[..., None].expand(-1, -1, -1, size - 2)
    return torch.cat([first[..., None], inner, last[..., None]], -1)


class _Block(nn.Module):
    """A residual block whose second norm is scaled and shifted by the embedding (AdaGN)."""

    def __init__(self, inputs: int, outputs: int, embedding: int, aware: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, inputs), nn.GroupNorm(GROUPS, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = AwareConvolution(outputs, outputs) if aware else _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[..., None, None].chunk(2, 1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class _Attention(nn.Module):
    """Attention of the cells to each other and to the words, which join keys and values."""

    def __init__(self, channels: int, words: int, width: int = 56) -> None:
        super().__init__()
        self.heads = max(1, channels // width)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.words = nn.Linear(words, 2 * channels) if words else None
        self.out = _zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, words: Tensor | None, mask: Tensor | None) -> Tensor:
        batch, _, height, width = x.shape
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, -1)
        visible = None
        if self.words is not None and words is not None:
            more_k, more_v = self.words(words).chunk(2, -1)
            k, v = torch.cat([k, more_k], 1), torch.cat([v, more_v], 1)
            visible = torch.cat([mask.new_ones(batch, height * width), mask], 1)[:, None, None]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        values = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
        return x + self.out(values).transpose(1, 2).reshape(x.shape)


class TriplaneUNet(nn.Module):
    """A network from noisy rolled-out planes, a time and a condition to rolled-out planes."""

    def __init__(self, shape: UNetShape) -> None:
        super().__init__()
        self.shape = shape
        widths, deep, p = shape.widths, shape.embedding, shape.patch
        grid = shape.side // p
        self.time = nn.Sequential(nn.Linear(64, deep), nn.SiLU(), nn.Linear(deep, deep))
        self.condition = nn.Linear(shape.condition, deep) if shape.condition else None
        self.place = nn.Parameter(torch.zeros(1, widths[0], grid, 3 * grid))
        self.begin = nn.Conv2d(shape.inputs * p * p, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrinks, self.grows = nn.ModuleList(), nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for level, out in enumerate(widths):
            blocks = nn.ModuleList()
            for _ in range(shape.blocks):
                blocks.append(self._step(width, out, level))
                width = out
                skips.append(width)
            self.down.append(blocks)
            if level + 1 < len(widths):
                self.shrinks.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = nn.ModuleList([self._step(width, width, len(widths) - 1), _Block(width, width, deep, False)])
        for level, out in reversed(list(enumerate(widths))):
            blocks = nn.ModuleList()
            for _ in range(shape.blocks + 1):
                blocks.append(self._step(width + skips.pop(), out, level))
                width = out
            self.up.append(blocks)
            if level:
                self.grows.append(nn.Conv2d(width, width, 3, padding=1))
        self.end = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.SiLU(), _zero(nn.Conv2d(width, shape.outputs * p * p, 3, padding=1))
        )

    def _step(self, inputs: int, outputs: int, level: int) -> nn.ModuleList:
        """A residual block, and attention where the level has it."""
        aware = level == 0 and len(self.shape.widths) > 1
        step = nn.ModuleList([_Block(inputs, outputs, self.shape.embedding, aware)])
        if level in self.shape.attention:
            step.append(_Attention(outputs, self.shape.words))
        return step

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        words: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return planes [B, outputs, R, 3 R].

        Args:
            x: [B, inputs, R, 3 R].
            t: [B] share of the way to noise, in [0, 1].
            condition: [B, D]. words: [B, L, W], and `mask` [B, L] which of them there are.
        """
        embedding = self.time(_waves(t))
        if self.condition is not None and condition is not None:
            embedding = embedding + self.condition(condition)
        embedding = F.silu(embedding)

        def run(step: nn.ModuleList, x: Tensor) -> Tensor:
            x = step[0](x, embedding)
            return step[1](x, words, mask) if len(step) > 1 else x

        x = self.begin(F.pixel_unshuffle(x, self.shape.patch)) + self.place
        skips = [x]
        for level, blocks in enumerate(self.down):
            for step in blocks:
                x = run(step, x)
                skips.append(x)
            if level < len(self.shrinks):
                x = self.shrinks[level](x)
                skips.append(x)
        x = self.middle[1](run(self.middle[0], x), embedding)
        for level, blocks in enumerate(self.up):
            for step in blocks:
                x = run(step, torch.cat([x, skips.pop()], 1))
            if level < len(self.grows):
                x = self.grows[level](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.end(x), self.shape.patch)


def _waves(t: Tensor) -> Tensor:
    """Sinusoids [B, 64] of times [B] in [0, 1]."""
    rates = torch.exp(torch.arange(32, device=t.device) * (-math.log(10_000) / 32))
    angles = 1000 * t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
