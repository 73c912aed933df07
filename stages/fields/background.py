"""The background: a tiny learned environment, or a flat random grey.

A large background network learns the prompt (facts of several implementations), so this one is 16 spherical-harmonic
values and one hidden layer, trained ten times slower than the field. Random backgrounds are the augmentation that keeps
the object opaque: nothing can be painted on a wall that changes every step.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from stages.errors import check_shape
from stages.fields.hashfield import Head
from stages.kernels.mlp import mlp
from stages.kernels.srgb import srgb_to_linear


class BackgroundSettings(BaseModel):
    """The background of training renders."""

    model_config = ConfigDict(extra="forbid")

    random_probability: float = Field(0.75, ge=0, le=1, description="share of steps with flat random backgrounds")
    grey: tuple[float, float] = Field((0.35, 1.0), description="sRGB range of the random grey, the pocket prior's own")
    tint: float = Field(0.02, ge=0, le=1, description="sRGB half width of a random offset per channel")
    hidden: int = Field(16, ge=4, le=64, description="hidden units of the learned environment")

    @field_validator("grey")
    @classmethod
    def _range(cls, grey: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= grey[0] <= grey[1] <= 1:
            raise ValueError(f"wanted 0 <= low <= high <= 1, got {list(grey)}")
        return grey


def harmonics(directions: Tensor) -> Tensor:
    """Real spherical harmonics up to degree 3 without their constant factors, [N, 16], of unit directions [N, 3]."""
    x, y, z = directions.unbind(-1)
    xx, yy, zz, xy, yz, xz = x * x, y * y, z * z, x * y, y * z, x * z
    return torch.stack(
        [
            torch.ones_like(x), y, z, x,
            xy, yz, 3 * zz - 1, xz, xx - yy,
            y * (3 * xx - yy), xy * z, y * (5 * zz - 1), z * (5 * zz - 3), x * (5 * zz - 1), z * (xx - yy),
            x * (xx - 3 * yy),
        ],
        -1,
    )  # fmt: skip


class Background(nn.Module):
    """Environment colour by direction: harmonics -> one hidden layer -> sigmoid, linear RGB; starts at mid grey."""

    def __init__(self, settings: BackgroundSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.settings = settings
        self.head = Head(16, settings.hidden, 3, generator)
        with torch.no_grad():
            self.head.w2.mul_(0.1)  # the harmonics' first look would otherwise be coloured stripes

    def forward(self, directions: Tensor) -> Tensor:
        """Return linear colour [N, 3] of unit directions [N, 3]."""
        check_shape("directions", directions, (None, 3))
        return torch.sigmoid(mlp(harmonics(directions), *self.head.weights()))


def random_background(settings: BackgroundSettings, batch: int, generator: torch.Generator) -> Tensor | None:
    """Return flat linear colours [B, 1, 1, 3], one per view, or None for a step that shows the learned environment.

    Always takes the same count of numbers from the generator.
    """
    draws = torch.rand(1 + 4 * batch, generator=generator)
    low, high = settings.grey
    grey = low + (high - low) * draws[1 : 1 + batch, None]  # [B, 1]
    srgb = grey + settings.tint * (2 * draws[1 + batch :].reshape(batch, 3) - 1)
    if draws[0] >= settings.random_probability:
        return None
    return srgb_to_linear(srgb)[:, None, None]
