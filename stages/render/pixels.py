"""Some pixels of a picture, and a picture of some pixels: each is the other's backward pass.

torch's own indexing does not know that no pixel is named twice, and adds up where it could copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take(picture: Tensor, pixels: Tensor) -> Tensor:
    """Read values [N, C] of a picture [..., C] at flat pixel indices [N], all different."""
    return _Take.apply(picture, pixels)


def place(values: Tensor, pixels: Tensor, canvas: Tensor) -> Tensor:
    """Return the picture `canvas` [..., C] with values [N, C] at flat pixel indices [N], all different."""
    return _Place.apply(values, pixels, canvas)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, picture: Tensor, pixels: Tensor) -> Tensor:
        ctx.save_for_backward(pixels)
        ctx.shape = picture.shape
        return picture.reshape(-1, picture.shape[-1]).index_select(0, pixels)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (pixels,) = ctx.saved_tensors
        return place(grad, pixels, grad.new_zeros(ctx.shape)), None


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, pixels: Tensor, canvas: Tensor) -> Tensor:
        ctx.save_for_backward(pixels)
        out = canvas.clone(memory_format=torch.contiguous_format)
        out.view(-1, out.shape[-1]).index_copy_(0, pixels, values)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (pixels,) = ctx.saved_tensors
        grad_canvas = None
        if ctx.needs_input_grad[2]:
            grad_canvas = place(grad.new_zeros(len(pixels), grad.shape[-1]), pixels, grad)
        return take(grad, pixels) if ctx.needs_input_grad[0] else None, None, grad_canvas
