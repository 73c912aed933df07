"""Small point networks in a folder, and ones whose cloud is a known ball."""

from __future__ import annotations

from pathlib import Path

import torch

from stages.points.cloud import REACH, channels_of
from stages.points.model import PointModel, Sizes, load_model
from stages.points.transformer import SdfShape, TransformerShape

RADIUS = 0.5


def tiny_sizes(vector: int = 96, grid: int = 144) -> Sizes:
    """Sizes of networks that a test can train."""
    base = TransformerShape(16, 2, 2, vector, grid)
    return Sizes(base, TransformerShape(16, 1, 2, vector, grid, low=True), SdfShape(16, 2, 1, 1, octaves=2))


def loud(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with weights that let every input be heard."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def tiny_networks(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """A folder of random networks."""
    model = PointModel(tiny_sizes(**sizes))
    loud(model, seed)
    model.save(folder)
    return folder


def ball_cloud(count: int = 1024) -> torch.Tensor:
    """A red ball's cloud [1, K, 6] as networks see it."""
    points = torch.nn.functional.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    return channels_of(RADIUS * points, torch.tensor([0.9, 0.1, 0.1]).expand(count, 3))[None]


class BallDistance(torch.nn.Module):
    """In place of an SdfNetwork: the ball's own distance, whatever the cloud."""

    def encode(self, points: torch.Tensor) -> torch.Tensor:
        return points

    def forward(self, code: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        return queries.norm(dim=-1) - RADIUS / REACH


def load_ball(folder: Path) -> PointModel:
    """The networks of a folder, whose clouds are a red ball's whatever they were asked; in place of load_model."""
    model = load_model(folder)
    model.sdf = BallDistance()
    model.x0 = lambda name, x, *rest: ball_cloud().to(x).expand(len(x), -1, -1)
    return model
