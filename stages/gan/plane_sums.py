"""The hidden layer of the lattice's network, from planes to values in one pass: torch's definition and a CPU kernel.

Letters: B shapes, M side of the planes drawn at every half cell, H hidden width, N lattice vertices.
    value[b, n] = W_b lrelu(XY[b, y, x] + YZ[b, z, y] + XZ[b, z, x] + bias)
torch alone writes [B, N, H] eight times over; the kernel keeps a vertex's H numbers in registers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stages.gan.layers import SLOPE, lrelu
from stages.kernels.cpu.jit import njit
from stages.kernels.untraced import stepped_over, untraced

OUT = 4  # signed distance and offset


def values_at(rows: Tensor, bias: Tensor, matrices: Tensor, at: Tensor) -> Tensor:
    """Return values [B, N, 4] at lattice vertices; differentiable in all but `at`.

    Args:
        rows: [B, 3, M, M, H] the hidden layer of XY, YZ and XZ: rows run along y, z, z, columns along x, y, x.
        bias: [H]. matrices: [B, H, 4].
        at: [N, 3] int64 x, y, z of the vertices in half cells.
    """
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        return untraced(_Values.apply, rows, bias, matrices, at)
    return values_by_torch(rows, bias, matrices, at)


def values_by_torch(rows: Tensor, bias: Tensor, matrices: Tensor, at: Tensor) -> Tensor:
    """Return what values_at does, by torch alone: its definition."""
    x, y, z = at.unbind(1)
    hidden = rows[:, 0, y, x] + rows[:, 1, z, y] + rows[:, 2, z, x] + bias
    return torch.bmm(lrelu(hidden), matrices)


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, bias: Tensor, matrices: Tensor, at: Tensor) -> Tensor:
        rows, matrices = rows.contiguous(), matrices.transpose(1, 2).contiguous()
        out = rows.new_empty(len(rows), len(at), OUT)
        _forward(*(t.detach().numpy() for t in (rows, bias, matrices, at, out)), np.float32(SLOPE))
        ctx.save_for_backward(rows, bias, matrices, at)
        return out

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        rows, bias, matrices, at = ctx.saved_tensors
        grads = [torch.zeros_like(t) for t in (rows, bias, matrices)]
        arrays = (t.detach().numpy() for t in (rows, bias, matrices, at, grad.contiguous(), *grads))
        _backward(*arrays, np.float32(SLOPE))
        return grads[0], grads[1], grads[2].transpose(1, 2), None


@njit(cache=True, nogil=True, fastmath={"contract", "nsz"})
def _forward(rows, bias, matrices, at, out, slope):
    shapes, hidden = rows.shape[0], rows.shape[4]
    one = np.float32(1)
    h = np.empty(hidden, np.float32)
    for b in range(shapes):
        for n in range(at.shape[0]):
            x, y, z = at[n, 0], at[n, 1], at[n, 2]
            xy, yz, xz = rows[b, 0, y, x], rows[b, 1, z, y], rows[b, 2, z, x]
            for k in range(hidden):
                value = xy[k] + yz[k] + xz[k] + bias[k]
                h[k] = value * (one if value > 0 else slope)
            for c in range(4):
                total = np.float32(0)
                for k in range(hidden):
                    total += h[k] * matrices[b, c, k]
                out[b, n, c] = total


@njit(cache=True, nogil=True, fastmath={"contract", "nsz"})
def _backward(rows, bias, matrices, at, grad, grad_rows, grad_bias, grad_matrices, slope):
    shapes, hidden = rows.shape[0], rows.shape[4]
    one = np.float32(1)
    for b in range(shapes):
        w, grad_w = matrices[b], grad_matrices[b]
        for n in range(at.shape[0]):
            g0, g1, g2, g3 = grad[b, n, 0], grad[b, n, 1], grad[b, n, 2], grad[b, n, 3]
            if g0 == 0 and g1 == 0 and g2 == 0 and g3 == 0:  # most vertices are far from the surface
                continue
            x, y, z = at[n, 0], at[n, 1], at[n, 2]
            xy, yz, xz = rows[b, 0, y, x], rows[b, 1, z, y], rows[b, 2, z, x]
            to_xy, to_yz, to_xz = grad_rows[b, 0, y, x], grad_rows[b, 1, z, y], grad_rows[b, 2, z, x]
            for k in range(hidden):
                value = xy[k] + yz[k] + xz[k] + bias[k]
                slope_here = one if value > 0 else slope
                h = value * slope_here
                grad_w[0, k] += g0 * h
                grad_w[1, k] += g1 * h
                grad_w[2, k] += g2 * h
                grad_w[3, k] += g3 * h
                back = slope_here * (g0 * w[0, k] + g1 * w[1, k] + g2 * w[2, k] + g3 * w[3, k])
                to_xy[k] += back
                to_yz[k] += back
                to_xz[k] += back
                grad_bias[k] += back
