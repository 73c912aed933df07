"""The discriminators: one tower for colours, one for silhouettes, each told where the camera stands.

A tower halves a picture until it is 4 x 4, adds how much the batch differs (minibatch standard deviation), and ends in
features whose product with a code of the camera is the logit (projection; Miyato & Koyama 2018).
Source: GET3D (arXiv 2209.11163) sec. 3.2 and appendix; StyleGAN2 (arXiv 1912.04958); ProGAN sec. 3 for the deviation.
Otherwise than there the first convolution reads blocks of 2 x 2 pixels, and the towers are narrow.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.gan.layers import GAIN, Conv, Linear, lrelu, normalised

CHANNELS = {"colour": (16, 48, 64, 96), "mask": (8, 24, 32, 48)}  # at 32, 16, 8, 4 pixels
CODE = 64  # numbers of a camera's code
ANGLES = 14  # azimuth and polar angle, each with sine and cosine at three octaves
GROUP = 4  # pictures that the deviation is taken over


def camera_numbers(angles: Tensor) -> Tensor:
    """Return [B, 14] of azimuth and elevation [B, 2] in degrees: the angles and their sines and cosines."""
    azimuth, elevation = torch.deg2rad(angles).unbind(-1)
    pair = torch.stack([azimuth, math.pi / 2 - elevation], -1)
    waves = [wave(2**k * pair) for k in range(3) for wave in (torch.sin, torch.cos)]
    return torch.cat([pair, *waves], -1)


class Tower(nn.Module):
    """A discriminator of pictures of so many channels, of 64 pixels a side."""

    def __init__(self, inputs: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.first = Conv(4 * inputs, channels[0], 3)
        pairs = list(pairwise(channels))
        self.conv = nn.ModuleList(Conv(a, a, 3) for a, _ in pairs)
        self.down = nn.ModuleList(Conv(a, b, 3) for a, b in pairs)
        self.skip = nn.ModuleList(Conv(a, b, 1, gain=1.0, bias=False) for a, b in pairs)
        self.last = Conv(channels[-1] + 1, channels[-1], 3)
        self.flat = Linear(16 * channels[-1], channels[-1], gain=GAIN)
        self.out = Linear(channels[-1], CODE)
        self.camera = nn.ModuleList(
            [Linear(ANGLES, CODE, gain=GAIN), Linear(CODE, CODE, gain=GAIN), Linear(CODE, CODE)]
        )

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """Return logits [B] of pictures x [B, inputs, 64, 64] seen from angles [B, 2], degrees."""
        x = lrelu(self.first(F.pixel_unshuffle(x, 2)))
        for conv, down, skip in zip(self.conv, self.down, self.skip, strict=True):
            across = skip(F.avg_pool2d(x, 2))
            x = (lrelu(down(F.avg_pool2d(lrelu(conv(x)), 2))) + across) * math.sqrt(0.5)
        x = lrelu(self.last(torch.cat([x, deviation(x)], 1)))
        x = self.out(lrelu(self.flat(x.flatten(1)))).float()
        code = normalised(camera_numbers(angles))
        for k, layer in enumerate(self.camera):
            code = layer(code).float()
            code = lrelu(code) if k < len(self.camera) - 1 else code
        return (x * normalised(code)).sum(1) / math.sqrt(CODE)


def deviation(x: Tensor) -> Tensor:
    """Return the mean standard deviation over groups of pictures, [B, 1, H, W], of x [B, C, H, W].

    A group is every (B / GROUP)-th picture; a batch that GROUP does not divide is one group.
    """
    batch, _, height, width = x.shape
    group = GROUP if batch % GROUP == 0 else batch
    parts = x.float().view(group, -1, *x.shape[1:])
    spread = ((parts - parts.mean(0)).square().mean(0) + 1e-8).sqrt().mean((1, 2, 3))  # [B / group]
    return spread.repeat(group)[:, None, None, None].expand(-1, 1, height, width).to(x.dtype)


class Discriminator(nn.Module):
    """Both towers; the logits of a picture are two."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = Tower(3, CHANNELS["colour"])
        self.mask = Tower(1, CHANNELS["mask"])

    def forward(self, pictures: Tensor, angles: Tensor) -> Tensor:
        """Return logits [B, 2] of pictures [B, 4, 64, 64], colours and coverage in [0, 1]."""
        colour, mask = pictures[:, :3] * 2 - 1, pictures[:, 3:]
        return torch.stack([self.colour(colour, angles), self.mask(mask, angles)], -1)
