"""A perceptron with one ReLU layer, and the derivative of its first output by its input, as one op.

Letters: N points, I inputs, H hidden units, O outputs. out = w2 relu(w1 x + b1) + b2; slope = d out[:, 0] / d x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.errors import check_shape
from stages.kernels.backend import choose_backend
from stages.kernels.cuda.launch import MLP_MAX
from stages.kernels.dispatch import module
from stages.kernels.untraced import stepped_over, untraced


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, backend: str = "auto") -> Tensor:
    """Evaluate a perceptron with one ReLU layer; differentiable in every argument.

    Args:
        x: [N, I].
        w1: [H, I].
        b1: [H].
        w2: [O, H].
        b2: [O].
        backend: a key of stages.kernels.backend.BACKENDS; warp takes up to cuda.launch.MLP_MAX inputs and outputs,
            beyond which "auto" is torch.
    Returns: [N, O].
    Raises: ValueError naming argument, wanted and got.
    """
    backend = _check(x, w1, b1, w2, b2, backend, adaptor=True)
    if backend in ("numba", "warp"):
        return untraced(_Mlp.apply, x, w1, b1, w2, b2, False, backend)[0]
    if backend == "tinycudann":
        from stages.kernels.adaptors import tinycudann

        return untraced(tinycudann.mlp, x, w1, b1, w2, b2)
    return torch.addmm(b2, torch.addmm(b1, x, w1.T).relu(), w2.T)


def mlp_with_slope(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Evaluate the perceptron and its first output's derivative by the input, w1^T (w2[0] * [hidden > 0]).

    The slope is piecewise constant in x and b1, so it sends gradients to w1 and w2 only, which is what ordinary
    differentiation of this expression gives: no double backward is needed for a loss on normals. tinycudann has no such
    op, nor a second derivative to make it of: under that name it goes by device and dtype.
    Args:
        x: [N, I].
        w1: [H, I].
        b1: [H].
        w2: [O, H].
        b2: [O].
        backend: as in mlp.
    Returns: out [N, O] and slope [N, I].
    """
    backend = _check(x, w1, b1, w2, b2, backend)
    if backend in ("numba", "warp"):
        return untraced(_Mlp.apply, x, w1, b1, w2, b2, True, backend)
    hidden = torch.addmm(b1, x, w1.T)  # [N, H]
    slope = (w2[0] * (hidden > 0).to(x.dtype)) @ w1
    return torch.addmm(b2, hidden.relu(), w2.T), slope


def _check(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, backend: str, adaptor: bool = False) -> str:
    check_weights(x.shape[-1], w1, b1, w2, b2)
    check_shape("x", x, (None, w1.shape[1]))
    choice = choose_backend(backend, x, w1, b1, w2, b2, family="mlp", adaptor=adaptor)
    sizes = (x.shape[1], w2.shape[0])
    if choice == "warp" and not all(1 <= size <= limit for size, limit in zip(sizes, MLP_MAX, strict=True)):
        if backend == "warp":
            widths = "{} inputs and {} outputs".format(*MLP_MAX)
            raise ValueError(f"backend: 'warp' is written for 1 to {widths}, got {sizes[0]} and {sizes[1]}")
        return "torch"
    return choice


def check_weights(inputs: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, outputs: int | None = None) -> None:
    """Raise ValueError by name unless the weights fit together and to so many inputs (and outputs)."""
    check_shape("w1", w1, (None, inputs))
    check_shape("b1", b1, (w1.shape[0],))
    check_shape("w2", w2, (outputs, w1.shape[0]))
    check_shape("b2", b2, (w2.shape[0],))


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, with_slope: bool, backend: str):
        ctx.save_for_backward(x, w1, b1, w2)
        ctx.with_slope, ctx.perceptron = with_slope, module(backend, "mlp")
        ctx.set_materialize_grads(False)
        return ctx.perceptron.forward(x, w1, b1, w2, b2, with_slope)

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor | None, grad_slope: Tensor | None):
        x, w1, b1, w2 = ctx.saved_tensors
        if grad_out is None and grad_slope is None:
            return None, None, None, None, None, None, None
        if grad_out is None:
            grad_out = x.new_zeros(x.shape[0], w2.shape[0])
        gradients = ctx.perceptron.backward(x, w1, b1, w2, grad_out, grad_slope if ctx.with_slope else None)
        return (*gradients, None, None)
