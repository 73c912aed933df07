"""Fit a field to the shape and colours of a prior's object, so that distillation starts from it.

GaussianDreamer (arXiv 2310.08529) and GSGEN (arXiv 2309.16585) begin from Shap-E and Point-E in the same way. What
pictures alone decide late or never is then there from the first step: a mug that is open at the top, a pair's places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stages.fields.hashfield import HashField
from stages.kernels.srgb import linear_to_srgb
from stages.ramp import Ramp

Radiance = Callable[[Tensor], tuple[Tensor, Tensor]]  # points [N, 3] -> density [N] >= 0, linear albedo [N, 3]

GRID = 48  # cells a side that are asked once for where the object is
NEAR = 0.75  # share of the points that lie in cells of the object or beside them


class StartSettings(BaseModel):
    """Settings of the field's initialisation."""

    model_config = ConfigDict(extra="forbid")

    source: Literal["blob", "prior"] = Field(
        "blob",
        description="a ball, or the object as the prior knows it in 3D, a ball if it does not",
    )
    steps: int = Field(150, ge=1, description="Adam steps to learn it")
    points: int = Field(8192, ge=64, le=1 << 20, description="random places in such a step")
    lr: float = Field(0.03, gt=0, description="Adam learning rate; a tenth of it at the end")


@torch.enable_grad()
def fit_start(
    field: HashField, radiance: Radiance, settings: StartSettings, generator: torch.Generator, step_size: float
) -> float:
    """Train a field towards an object's opacity and colours at points; returns the root mean squared opacity error.

    Opacity is that of one sampling step, 1 - exp(-density step_size): how dense a solid is inside does not matter.

    Args:
        radiance: the object. generator: a CPU generator that points are drawn from.
        step_size: world length of one sampling step of the renders to come.
    """
    device = field.table.device
    field.ball.zero_()  # what the field is to learn has a shape of its own
    parameters = [p for p in field.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=settings.lr, betas=(0.9, 0.99), eps=1e-15)
    lr = Ramp(settings.lr, settings.lr / 10, shape="cosine")
    cells = _cells(radiance, step_size, device)
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = lr.at(step / settings.steps)
        points = _points(cells, settings.points, generator).to(device)
        opacity, colour = _opacity_and_albedo(radiance, points, step_size)
        density, albedo = field(points)
        opacity_error = (1 - torch.exp(-density * step_size) - opacity).square().mean()
        colour_error = (linear_to_srgb(albedo) - linear_to_srgb(colour)).square().mean(-1)
        loss = opacity_error + (opacity * colour_error).sum() / opacity.sum().clamp_min(1)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    with torch.no_grad():
        points = _points(cells, settings.points, generator).to(device)
        opacity, _ = _opacity_and_albedo(radiance, points, step_size)
        gap = 1 - torch.exp(-field(points)[0] * step_size) - opacity
    return float(gap.square().mean().sqrt())


@torch.no_grad()
def _opacity_and_albedo(radiance: Radiance, points: Tensor, step_size: float) -> tuple[Tensor, Tensor]:
    """Return opacity [N] of a sampling step and linear albedo [N, 3] of the object at points [N, 3]."""
    density, albedo = radiance(points)
    return 1 - torch.exp(-density * step_size), albedo


def _cells(radiance: Radiance, step_size: float, device: torch.device) -> Tensor:
    """Return centres [C, 3] of the cells that hold the object and of their neighbours, on the CPU."""
    axis = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
    centres = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
    opacity, _ = _opacity_and_albedo(radiance, centres.to(device), step_size)
    solid = (opacity > 0.1).float().cpu().view(1, 1, GRID, GRID, GRID)
    near = torch.nn.functional.max_pool3d(solid, 3, stride=1, padding=1).view(-1) > 0
    return centres[near]


def _points(cells: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw random points [count, 3]: a NEAR share of them in cells where there are any, the rest anywhere."""
    close = round(NEAR * count) if len(cells) else 0
    points = 2 * torch.rand(count, 3, generator=generator) - 1
    if close:
        centres = cells[torch.randint(len(cells), (close,), generator=generator)]
        points[:close] = centres + points[:close] / GRID
    return points
