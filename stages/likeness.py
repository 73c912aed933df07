"""The object that a prior knows in 3D, moved and stretched until it is seen as the picture that a run is held to.

Words do not say how wide a mug is for its height. Without this the prior draws its own mug from every other side, and
the picture's silhouette cuts into that: holes in the wall behind the handle. With it both want the same object. What
one view cannot tell stays as the prior has it: width and depth are stretched alike, unless the picture speaks against
it.
Letters: S the side of the small picture that is compared, N samples of a ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.cameras import rays
from stages.guidance.guide import Guide, ShapeGuide, WarpedGuide
from stages.kernels.srgb import linear_to_srgb
from stages.picture import BEHIND, Picture

if TYPE_CHECKING:
    from stages.render.volume import Radiance

SIDE, SAMPLES = 40, 48
REACH = 1.0  # of the object from the middle of the scene
STEPS, LR = 80, 0.02  # Adam
# Weights of the squared log of width by depth, of the offset and of the log of the size. The first two are what a view
# tells least: at 0.1 and 0.03 a teapot and a mushroom came out worse than they were known (volume IoU 0.89 to 0.85).
UNEVEN, OFFSET, SIZE = 0.5, 0.3, 0.002
COLOUR = 0.3  # weight of colours beside the silhouette's


@dataclass(frozen=True)
class Likeness:
    """What a fit came to.

    Args:
        warp: [4, 4], takes points of the world to points of the object as the prior knows it.
        iou: of the silhouettes afterwards.
        iou_before: of the silhouettes of the object as it was.
    """

    warp: Tensor
    iou: float
    iou_before: float


def liken(guide: Guide | None, picture: Picture | None, device: torch.device) -> Likeness | None:
    """Stretch the object of a guide that knows one to its picture; returns how, None where there is nothing to do."""
    if picture is None or not (isinstance(guide, ShapeGuide) and isinstance(guide, WarpedGuide)):
        return None
    radiance = guide.shape()
    if radiance is None:
        return None
    likeness = fit_warp(radiance, picture, device)
    guide.warp(likeness.warp)
    return likeness


@torch.enable_grad()
def fit_warp(radiance: Radiance, picture: Picture, device: torch.device) -> Likeness:
    """Return the stretching and the offset under which an object is seen as its picture is, by gradient descent.

    Args:
        radiance: the object; differentiable in its points.
        picture: of an object that is like it.
        device: where the object is known.
    """
    wanted_mask = picture.mask_at(SIDE).to(device)
    wanted = picture.colour_at(SIDE).to(device)
    rays_o, rays_d = (r[0] for r in rays(picture.view.to(device), SIDE, SIDE))
    far = picture.settings.distance
    t = far + REACH * (2 * (torch.arange(SAMPLES, device=device) + 0.5) / SAMPLES - 1) * 1.2
    points = rays_o[..., None, :] + t[:, None] * rays_d[..., None, :]  # [S, S, N, 3]
    width = 2.4 * REACH / SAMPLES

    def seen(warp: Tensor) -> tuple[Tensor, Tensor]:
        density, albedo = radiance((points @ warp[:3, :3].T + warp[:3, 3]).view(-1, 3))
        alpha = 1 - torch.exp(-density.view(SIDE, SIDE, SAMPLES) * width)
        open_before = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha[..., :-1]], -1), -1)
        weights = (open_before * alpha)[..., None]
        mask = weights.sum(-2)
        return (weights * albedo.view(SIDE, SIDE, SAMPLES, 3)).sum(-2) + (1 - mask) * BEHIND, mask

    sizes = torch.zeros(3, device=device, requires_grad=True)  # log of height, of width and depth, of width by depth
    offset = torch.zeros(3, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([sizes, offset], lr=LR)
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        colour, mask = seen(_warp(sizes, offset))
        loss = (mask - wanted_mask).square().mean()
        loss = loss + COLOUR * (linear_to_srgb(colour) - wanted).square().mean()
        loss = loss + UNEVEN * sizes[2].square() + OFFSET * offset.square().sum() + SIZE * sizes[:2].square().sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        warp = _warp(sizes, offset)
        ious = [_iou(seen(each)[1], wanted_mask) for each in (torch.eye(4, device=device), warp)]
    return Likeness(warp.detach().cpu(), ious[1], ious[0])


def _warp(sizes: Tensor, offset: Tensor) -> Tensor:
    """From the world to the object: less the offset, then through the sizes."""
    height, across, uneven = sizes.unbind()
    scale = torch.exp(-torch.stack([across + uneven / 2, height, across - uneven / 2]))
    corner = torch.cat([torch.diag(scale), -(scale * offset)[:, None]], 1)
    return torch.cat([corner, corner.new_tensor([[0.0, 0.0, 0.0, 1.0]])])


def _iou(mask: Tensor, wanted: Tensor) -> float:
    a, b = mask > 0.5, wanted > 0.5
    return float((a & b).sum() / (a | b).sum().clamp_min(1))
