"""A colour field taught the colours that a surface already has, so that refining a mesh starts from its own paint."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stages.fields.hashfield import HashField
from stages.kernels.srgb import linear_to_srgb

PLAIN = 1 / 255  # a surface whose sRGB colours spread less than this has one colour
Sample = Callable[[int], tuple[Tensor, Tensor]]  # count -> points [N, 3] in the scene, linear colours [N, 3]


class FitSettings(BaseModel):
    """Settings of the fit of the colour field to a given mesh's colours before the first step."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(300, ge=0, description="Adam steps; 0 keeps the field's own first colours")
    points: int = Field(8192, ge=64, le=1 << 20, description="random places on the surface in one step")
    lr: float = Field(2e-2, gt=0, description="Adam learning rate, falling to a tenth as a cosine")


@torch.enable_grad()  # a preview or the end of a stage may be the first to ask for the surface
def fit_albedo(field: HashField, sample: Sample, settings: FitSettings, device: torch.device | str = "cpu") -> float:
    """Train the field's albedo towards a surface's colours: mean squared error in sRGB.

    The head's bias starts at the mean colour; where that is all there is (a plain mesh), nothing more is done.
    Returns: root mean squared sRGB error over fresh points, in [0, 1].
    """
    if settings.steps == 0:
        return _error(field, *_to_device(sample(settings.points), device))
    points, colours = _to_device(sample(settings.points), device)
    mean = colours.mean(0).clamp(1e-3, 1 - 1e-3)
    field.start_albedo(mean)
    if float(linear_to_srgb(colours).std(0).max()) < PLAIN:
        return _error(field, points, colours)
    parameters = field.albedo_parameters()
    optimiser = torch.optim.Adam(parameters, lr=settings.lr, betas=(0.9, 0.99), eps=1e-15)
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * step / settings.steps)))
        points, colours = _to_device(sample(settings.points), device)
        loss = (linear_to_srgb(field.albedo(points)) - linear_to_srgb(colours)).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return _error(field, *_to_device(sample(settings.points), device))


def _to_device(pair: tuple[Tensor, Tensor], device: torch.device | str) -> tuple[Tensor, Tensor]:
    return pair[0].to(device), pair[1].to(device)


@torch.no_grad()
def _error(field: HashField, points: Tensor, colours: Tensor) -> float:
    gap = linear_to_srgb(field.albedo(points)) - linear_to_srgb(colours)
    return float(gap.square().mean().sqrt())
