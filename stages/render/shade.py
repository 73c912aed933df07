"""Shading: Lambert with one point light, and the random mix of shadings that a training run sees.

colour = albedo * (ambient + diffuse * max(0, n . l)),  l the unit vector to the light
(DreamFusion, arXiv 2209.14988, sec. 3.1; the mix is app. A.2: plain albedo first, then one kind per step).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from stages.kernels.lambert import lambert

TEXTURELESS_ALBEDO = 0.8  # light grey: the paper's pure white clips where ambient and diffuse add up to 1


class ShadingSettings(BaseModel):
    """Settings of a step's shading; the defaults are DreamFusion's mix with a softer ambient."""

    model_config = ConfigDict(extra="forbid")

    albedo_until: float = Field(
        0.2, ge=0, le=1, description="share of the stage, from its start, that shows plain albedo only"
    )
    diffuse_probability: float = Field(0.75, ge=0, le=1, description="probability that a later step is shaded")
    textureless_probability: float = Field(0.5, ge=0, le=1, description="of the shaded steps, the share without colour")
    ambient: tuple[float, float] = Field(
        (0.1, 0.5), description="range of the ambient share of a shaded step; diffuse is the rest (paper: 0.1, 0.1)"
    )

    @field_validator("ambient")
    @classmethod
    def _ordered(cls, ambient: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= ambient[0] <= ambient[1] <= 1:
            raise ValueError(f"wanted 0 <= low <= high <= 1, got {list(ambient)}")
        return ambient


@dataclass(frozen=True)
class Shading:
    """The shading of one step, the same for all its views."""

    ambient: float = 1.0
    diffuse: float = 0.0
    textureless: bool = False

    @property
    def kind(self) -> Literal["albedo", "lambert", "textureless"]:
        if self.textureless:
            return "textureless"
        return "lambert" if self.diffuse else "albedo"


ALBEDO = Shading()
LAMBERT = Shading(ambient=0.3, diffuse=0.7)  # the look of previews and reports


def sample_shading(settings: ShadingSettings, share: float, generator: torch.Generator) -> Shading:
    """Draw the shading of a step: albedo, Lambert or textureless.

    Always takes three numbers from the generator, so changing a probability leaves later draws where they were.

    Args:
        settings: the mix.
        share: of the stage done, in [0, 1].
        generator: a CPU generator.
    Returns: the shading of all views of the step.
    """
    shaded, bare, soft = torch.rand(3, generator=generator).tolist()
    if share < settings.albedo_until or shaded >= settings.diffuse_probability:
        return ALBEDO
    low, high = settings.ambient
    ambient = low + (high - low) * soft
    return Shading(ambient, 1 - ambient, bare < settings.textureless_probability)


def shade(
    albedo: Tensor,
    normals: Tensor,
    positions: Tensor,
    light: Tensor,
    shading: Shading,
    *,
    shortest: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Return the Lambertian colour of surface points under a point light without falloff (DreamFusion sec. 3.1).

    Args:
        albedo, normals, positions: [..., 3], of one shape: linear colour, unit normal (zero: no diffuse part), world.
        light: world position of the light, broadcastable to positions.
        shortest: > 0 for normals that are not unit: the length below which one stays short (stages/kernels/lambert.py).
    Returns: [..., 3] linear. A textureless step has no gradient to albedo, an albedo step none to normals.
    Not differentiable in: n . l at 0, where a point turns away from the light.
    """
    if shading.diffuse == 0:
        grey = torch.full_like(albedo, TEXTURELESS_ALBEDO) if shading.textureless else albedo
        return grey if shading.ambient == 1 else grey * shading.ambient
    plain = albedo.new_full((1, 3), TEXTURELESS_ALBEDO) if shading.textureless else albedo.reshape(-1, 3)
    light = light.reshape(1, 3) if light.numel() == 3 else light.expand(positions.shape).reshape(-1, 3)
    flat = (plain, normals.reshape(-1, 3), positions.reshape(-1, 3), light)
    shaded = lambert(*flat, shading.ambient, shading.diffuse, shortest=shortest, backend=backend)
    return shaded.reshape(positions.shape)
