"""The transmittance term that keeps a radiance field from filling its box with fog (Dream Fields eq. 7).

    loss = -weight * mean over views of min(tau, mean transmittance),   tau = 1 - target opacity
The target opacity is annealed exponentially from the first value to the second: aiming at a sparse field from the
start leaves some prompts with none. It is the share of the image that the object covers, so it is scaled by how large
a view shows the object, focal^2 / distance^2, and the pair means the same at every zoom (dreamfields/lib.py).
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stages.cameras import Views
from stages.errors import check_shape
from stages.ramp import Ramp

# The paper scales by m^2 / (radius / 4)^2 / 1.2 with m times the focal length of NeRF's Blender scenes, 1111.11 of 800
# pixels. At the origin half the frame is then h = 0.36 radius / m world units, and the factor is 1.728 / h^2.
FRAME = 16 * 0.36**2 / 1.2


class TransmittanceSettings(BaseModel):
    """Settings of the loss on the share of the image that the field covers."""

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(0.0, ge=0, description="weight of the term; 0.5 in the paper, 0: none")
    opacity: Ramp = Field(
        Ramp(0.5, 0.1, 0.0, 0.05, "exponential"),
        gt=0,
        le=1,
        description="target mean opacity in a frame of +-1.31 world units",
    )


def target_opacity(views: Views, progress: float, settings: TransmittanceSettings) -> Tensor:
    """Return the target mean opacity [B] of each view in (0, 1] at a share of the stage done."""
    half = views.position.norm(dim=-1) * torch.deg2rad(views.fov_deg / 2).tan()  # of the frame at the origin
    return (settings.opacity.at(progress) * FRAME / half.square()).clamp_max(1.0)


def transmittance_loss(opacity: Tensor, views: Views, progress: float, settings: TransmittanceSettings) -> Tensor:
    """Return the weighted term, a scalar <= 0; differentiable in the opacities [B, H, W, 1] of B views."""
    check_shape("opacity", opacity, (len(views), None, None, 1))
    mean = 1 - opacity.mean((1, 2, 3))  # [B]
    tau = 1 - target_opacity(views, progress, settings).to(mean)
    return -settings.weight * torch.minimum(tau, mean).mean()
