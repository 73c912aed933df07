"""Tri-planes whose object is known, and small networks in a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from stages.triplane.field import Decoder
from stages.triplane.model import Sizes, TriplaneModel, load_model
from stages.triplane.planes import AXES, BOX
from stages.triplane.unet import UNetShape

RADIUS = 0.5
SHARPNESS = 60.0  # of a ball's logit, per squared length


def ball_planes(side: int = 64, channels: int = 2) -> torch.Tensor:
    """Planes [1, 3, C, R, R] whose first channel sums to twice the squared distance from the origin."""
    axis = (torch.arange(side) + 0.5) * (2 * BOX / side) - BOX
    planes = torch.zeros(1, 3, channels, side, side)
    for plane in range(len(AXES)):
        planes[0, plane, 0] = axis[None, :].square() + axis[:, None].square()
    return planes


def ball_decoder(radius: float = RADIUS, channels: int = 2) -> Decoder:
    """A decoder to which the first channel is twice the squared distance: a red ball. silu(x) - silu(-x) = x."""
    decoder = Decoder(channels, 4)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        decoder.hidden[0].weight[0, 0], decoder.hidden[0].weight[1, 0] = 0.5, -0.5
        decoder.hidden[2].weight[0, :2] = torch.tensor([1.0, -1.0])
        decoder.hidden[2].weight[1, :2] = torch.tensor([-1.0, 1.0])
        decoder.out.weight[0, :2] = torch.tensor([-SHARPNESS, SHARPNESS])
        decoder.out.bias[0] = SHARPNESS * radius**2
        decoder.out.bias[1:] = torch.tensor([3.0, -3.0, -3.0])
    return decoder


def tiny_sizes(vector: int = 96, words: int = 128) -> Sizes:
    """Sizes of networks that a test can train."""
    base = UNetShape(8, 2, 2, 2, (8, 16), 1, (1,), vector, words)
    return Sizes(2, 8, 16, 16, base, UNetShape(16, 4, 2, 2, (8, 16), 1, (), vector))


def tiny_networks(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """A folder of random networks."""
    torch.manual_seed(seed)
    model = TriplaneModel(tiny_sizes(**sizes))
    for parameter in (*model.base.parameters(), *model.up.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    model.save(folder)
    return folder


def load_ball(folder: Path) -> TriplaneModel:
    """The networks of a folder, whose planes are a red ball's whatever they were asked; in place of load_model."""
    model = load_model(folder)
    model.decoder = ball_decoder().requires_grad_(False)
    model.planes = lambda rolled: ball_planes().to(rolled.device)
    return model
