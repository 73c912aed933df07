"""Colours by clamping, whose gradient does not die at the bounds."""

from __future__ import annotations

import torch
from torch import Tensor


class _Clamped(torch.autograd.Function):
    """clamp(1/2 + raw / 4, 0, 1); backward, a gradient that would push a value further out of its bounds is zero."""

    @staticmethod
    def forward(ctx, raw: Tensor) -> Tensor:
        value = 0.5 + 0.25 * raw
        ctx.save_for_backward(value)
        return value.clamp(0, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        outwards = ((value <= 0) & (gradient > 0)) | ((value >= 1) & (gradient < 0))
        return torch.where(outwards, 0.0, 0.25 * gradient)


def clamped(raw: Tensor) -> Tensor:
    """Map unbounded values of any shape into [0, 1]: a logistic function's line at 0, cut off at the bounds.

    Descending along its gradient is projected gradient descent: at a bound a value stays while the loss pulls it
    outwards, and comes back at full speed when the loss turns round. A logistic function's gradient vanishes there, so
    what score distillation once burnt to pure yellow can get neither its shade nor an eye any more.
    """
    return _Clamped.apply(raw)


def before_clamping(value: Tensor) -> Tensor:
    """Return the raw values that `clamped` makes these of."""
    return 4 * (value - 0.5)
