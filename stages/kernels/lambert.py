"""Lambertian shading of surface points under a point light, in one pass each way (DreamFusion, sec. 3.1).

Letters: N points. An albedo or a light of one row, [1, 3], is that of every point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.errors import check_shape
from stages.kernels.backend import choose_backend
from stages.kernels.dispatch import module
from stages.kernels.reference import lambert as twin
from stages.kernels.untraced import stepped_over, untraced


def lambert(
    albedo: Tensor,
    normals: Tensor,
    points: Tensor,
    light: Tensor,
    ambient: float,
    diffuse: float,
    *,
    shortest: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Shade points: albedo (ambient + diffuse max(0, n . l)), l the unit vector from point to light.

    Args:
        albedo: [N or 1, 3].
        normals: [N, 3].
        points: [N, 3].
        light: [N or 1, 3], in the points' space.
        shortest: n is the normal over its length, or over this where it is shorter, which bounds the gradient; 0 takes
            normals as they are.
    Returns: [N, 3]. Differentiable in albedo, normals, points and light, but not where n . l = 0.
    Raises: ValueError naming argument, wanted and got.
    """
    n = len(normals)
    check_shape("normals", normals, (n, 3))
    check_shape("points", points, (n, 3))
    check_shape("albedo", albedo, (1 if len(albedo) == 1 else n, 3))
    check_shape("light", light, (1 if len(light) == 1 else n, 3))
    backend = choose_backend(backend, albedo, normals, points, light, family="raster")
    if backend == "torch":
        return twin.lambert(albedo, normals, points, light, ambient, diffuse, shortest)
    return untraced(_Lambert.apply, albedo, normals, points, light, ambient, diffuse, shortest, backend)


class _Lambert(torch.autograd.Function):
    @staticmethod
    def forward(ctx, albedo, normals, points, light, ambient, diffuse, shortest, backend):
        out = normals.new_empty(normals.shape)
        module(backend, "lambert").lambert_forward(albedo, normals, points, light, ambient, diffuse, shortest, out)
        ctx.save_for_backward(albedo, normals, points, light)
        ctx.numbers, ctx.backend = (ambient, diffuse, shortest), backend
        return out

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        albedo, normals, _, light = ctx.saved_tensors
        in_albedo, in_normals, in_points, in_light = ctx.needs_input_grad[:4]
        needs = (in_albedo, in_normals, in_points or in_light)
        grads = [normals.new_empty(normals.shape if want else (0, 3)) for want in needs]
        module(ctx.backend, "lambert").lambert_backward(*ctx.saved_tensors, *ctx.numbers, grad, *grads)
        return (
            _summed(grads[0], albedo) if in_albedo else None,
            grads[1] if in_normals else None,
            grads[2] if in_points else None,
            _summed(-grads[2], light) if in_light else None,
            *(None,) * 4,
        )


def _summed(grad: Tensor, of: Tensor) -> Tensor:
    """The gradient of a tensor that has one row for all points, or one each."""
    return grad if len(of) == len(grad) else grad.sum(0, keepdim=True)
