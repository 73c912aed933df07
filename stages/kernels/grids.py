"""Objects as small grids of density, colour and normal, placed in a scene and composited along rays.

Letters: M grids of G^3 cells; B views with R rays and at most K objects each. A cell holds CHANNELS numbers: raw
density, linear albedo (3), normal (3), one unused. Optics as in volume.py; where objects overlap their densities add
and their colours mix by density.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.errors import check_shape
from stages.kernels.backend import choose_backend
from stages.kernels.dispatch import module
from stages.kernels.reference import grids as twin
from stages.kernels.reference.grids import CHANNELS
from stages.kernels.untraced import stepped_over, untraced


def composite_grids(
    grids: Tensor,
    index: Tensor,
    placement: Tensor,
    origins: Tensor,
    directions: Tensor,
    *,
    steps: int,
    jitter: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Composite placed grids along rays by emission and absorption (Max 1995), trilinear, activated after sampling.

    Args:
        grids: [M, G, G, G, CHANNELS], indexed x, y, z, each over [-EXTENT, EXTENT]^3 of its object's own coordinates;
            outside the ball in it, which no ray of an object alone meets, everything is empty.
        index: [B, K] int32, the grid of each object of a view; -1: no object.
        placement: [B, K, 4] scale and offset: a point p of the object is at scale p + offset in the world.
        origins: [B, R, 3] in the world.
        directions: [B, R, 3] unit.
        steps: samples across a grid; a ray through a pair takes more.
        jitter: [B, R] in [0, 1), where in its interval each sample lies; None: in the middle.
    Returns: [B, R, 8] albedo (3), normal (3), 1 and the distance along the ray, each summed with the weights of
        volume.py, so that the seventh is the opacity; differentiable in the grids.
    Not differentiable in: placement, rays.
    """
    check_shape("grids", grids, (None, grids.shape[1], grids.shape[1], grids.shape[1], CHANNELS))
    views, objects = index.shape
    check_shape("placement", placement, (views, objects, 4))
    check_shape("origins", origins, (views, None, 3))
    check_shape("directions", directions, tuple(origins.shape))
    if jitter is None:
        jitter = torch.full_like(origins[..., 0], 0.5)
    check_shape("jitter", jitter, tuple(origins.shape[:2]))
    if steps < 1:
        raise ValueError(f"steps: wanted at least 1, got {steps}")
    backend = choose_backend(backend, grids, origins, directions, family="volume")
    scene = (index.int(), placement, origins, directions, steps, jitter)
    if backend == "numba":
        return untraced(_Composite.apply, grids, *scene)
    return twin.composite_grids(grids, *scene)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grids: Tensor, *scene) -> Tensor:
        ctx.scene = scene
        ctx.save_for_backward(grids)
        return module("numba", "grids").forward(grids, *scene)

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        out = module("numba", "grids").backward(*ctx.saved_tensors, *ctx.scene, grad)
        return (out, *[None] * len(ctx.scene))
