"""Volume rendering of a field over a backdrop: march -> early termination -> evaluate -> shade -> composite.

Letters: B views, R = B H W rays, N samples of all rays. Shading is applied per sample, before compositing
(DreamFusion sec. 3.1), so colours, normals and depths of one ray may come from several surfaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.cameras import Views, rays
from stages.kernels.volume import composite, cull, march
from stages.phases import phase
from stages.render.shade import ALBEDO, Shading, shade

STEP_SIZE = 2 * math.sqrt(3) / 128  # world length: 128 samples along the box's diagonal


Radiance = Callable[[Tensor], tuple[Tensor, Tensor]]  # points [N, 3] -> density [N] >= 0, linear albedo [N, 3]


class RadianceField(Protocol):
    """The protocol of a field that the renderer draws.

    `features` and `density` serve the density pass, which has no gradients; the rows of those features that are kept
    come back to the other two as `known`, which return sigma, (normal) and albedo with gradients all the same.
    """

    def features(self, points: Tensor) -> Tensor: ...

    def density(self, points: Tensor, features: Tensor | None = None) -> Tensor: ...

    def forward(self, points: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    def density_and_normal(self, points: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class Sampling:
    """Settings of the samples along a ray.

    Args:
        step_size: world length between two samples of a ray.
        early_stop: share of the light below which a sample is left out, in [0, 1).
        min_optical_depth: optical depth below which a sample is left out; behind a softplus those hardly have a
            gradient.
        thin_stride: how many times more coarsely thin cells (value 2 of the occupancy) are sampled; 1 for pictures
            without noise.
    """

    step_size: float = STEP_SIZE
    early_stop: float = 1e-3
    min_optical_depth: float = 3e-4
    thin_stride: int = 1


DEFAULT_SAMPLING = Sampling()


@dataclass
class VolumeImages:
    """Renders of B views.

    Args:
        colour: [B, H, W, 3] linear, over the backdrop.
        opacity: [B, H, W, 1].
        depth: [B, H, W, 1] sum of w t.
        normal: [B, H, W, 3] sum of w n, not unit; None where normals were not asked for.
        backdrop: [B, H, W, 3] what the field was composited over.
        orientation: Ref-NeRF's penalty on samples that face away (0 without normals), sum over samples of
            stopgrad(w) max(0, n . d)^2 divided by the number of rays that hit something (opacity > 0.01).
        samples: how many were evaluated with gradients.
    """

    colour: Tensor
    opacity: Tensor
    depth: Tensor
    normal: Tensor | None
    backdrop: Tensor
    orientation: Tensor
    samples: int


def render_field(
    field: RadianceField,
    backdrop: Tensor | Callable[[Tensor], Tensor],
    occupancy: Tensor,
    views: Views,
    height: int,
    width: int,
    *,
    shading: Shading = ALBEDO,
    normals: bool = False,
    sampling: Sampling = DEFAULT_SAMPLING,
    generator: torch.Generator | None = None,
) -> VolumeImages:
    """Render `field` from every view.

    Args:
        field: see RadianceField.
        backdrop: linear colour broadcastable to [B, H, W, 3], or a function of unit directions [R, 3] -> [R, 3].
        occupancy: [G, G, G] uint8 or bool as in kernels/volume.py.
        views: B views on the field's device.
        height: of the pictures, pixels.
        width: of the pictures, pixels.
        shading: one for all views; a diffuse part needs normals and computes them.
        normals: also composite normals and the orientation penalty (costs about as much again).
        sampling: where the rays are sampled.
        generator: on the CPU; offsets each ray's samples by a random part of a step. None: by half a step.
    Returns: the renders, differentiable in the field's parameters and in the backdrop.
    """
    rays_o, rays_d = (v.reshape(-1, 3) for v in rays(views, height, width))
    device, count = rays_o.device, rays_o.shape[0]
    jitter = torch.full((count,), 0.5) if generator is None else torch.rand(count, generator=generator)
    with phase("march"):
        samples = march(
            rays_o, rays_d, occupancy, sampling.step_size, jitter.to(device), thin_stride=sampling.thin_stride
        )
        points = _points(rays_o, rays_d, samples)
    with torch.no_grad(), phase("density pass"):
        features = field.features(points)
        keep, samples = cull(field.density(points, features), samples, sampling.early_stop, sampling.min_optical_depth)
        points, features = points.index_select(0, keep), features.index_select(0, keep)

    directions = rays_d.index_select(0, samples.rays)  # [N, 3]
    normals = normals or shading.diffuse != 0
    normal = None
    with phase("field"):
        if normals:
            sigma, normal, albedo = field.density_and_normal(points, features)
        else:
            sigma, albedo = field.forward(points, features)
    if shading.diffuse != 0:
        light = views.light.index_select(0, samples.rays // (height * width))
        colour = shade(albedo, normal, points, light, shading)
    else:
        colour = shade(albedo, points, points, points, shading)  # neither normals nor light enter
    values = colour if normal is None else torch.cat([colour, normal], -1)
    with phase("composite"):
        out, weights, opacity, depth = composite(sigma, values, samples)

    shape = (len(views), height, width)
    pixels = backdrop(rays_d).reshape(*shape, 3) if callable(backdrop) else backdrop.to(device).expand(*shape, 3)
    image = out[:, :3].reshape(*shape, 3) + (1 - opacity).reshape(*shape, 1) * pixels
    orientation = torch.zeros((), device=device)
    if normal is not None:
        facing = (normal * directions).sum(-1).clamp_min(0).square()
        orientation = (weights.detach() * facing).sum() / (opacity > 0.01).sum().clamp_min(1)
    return VolumeImages(
        colour=image,
        opacity=opacity.reshape(*shape, 1),
        depth=depth.reshape(*shape, 1),
        normal=None if normal is None else out[:, 3:].reshape(*shape, 3),
        backdrop=pixels,
        orientation=orientation,
        samples=len(samples),
    )


def _points(rays_o: Tensor, rays_d: Tensor, samples) -> Tensor:
    """World positions [N, 3] of the samples."""
    index = samples.rays
    return torch.addcmul(rays_o.index_select(0, index), samples.t[:, None], rays_d.index_select(0, index))
