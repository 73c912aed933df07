"""The sRGB transfer curve, IEC 61966-2-1: every step passes whole pictures through it.

On CUDA torch's own kernels do; there is no Warp form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.kernels.backend import choose_backend
from stages.kernels.dispatch import module
from stages.kernels.reference import srgb as twin
from stages.kernels.reference.srgb import KNEE
from stages.kernels.untraced import stepped_over, untraced


def linear_to_srgb(linear: Tensor, *, backend: str = "auto") -> Tensor:
    """Convert to sRGB: 12.92 x up to KNEE, else 1.055 x^(1 / 2.4) - 0.055; finite gradient at 0.

    Args:
        linear: of any shape, clamped to [0, 1].
        backend: torch or numba; others mean torch.
    Returns: of the same shape. What is not a number stays so.
    """
    backend = choose_backend(backend, linear, family="raster")
    if backend == "numba":
        return untraced(_Curve.apply, linear)
    return twin.linear_to_srgb(linear)


def srgb_to_linear(srgb: Tensor) -> Tensor:
    """Invert :func:`linear_to_srgb`; input clamped to [0, 1]."""
    srgb = srgb.clamp(0, 1)
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)


class _Curve(torch.autograd.Function):
    """The slope comes from the value, so that the power is taken once."""

    @staticmethod
    def forward(ctx, linear: Tensor) -> Tensor:
        srgb = linear.detach().clamp(KNEE, 1).pow_(1 / 2.4).contiguous()  # which torch takes in vectors
        module("numba", "srgb").srgb_forward(linear, srgb)
        ctx.save_for_backward(linear, srgb)
        return srgb

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        out = grad.new_empty(grad.shape)
        module("numba", "srgb").srgb_backward(*ctx.saved_tensors, grad, out)
        return out
