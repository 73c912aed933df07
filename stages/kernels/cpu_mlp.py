"""The small perceptron of mlp.py on the CPU (numba): blocks of points, transposed so that points fill the vector lanes.

Four rows are folded per pass over an accumulator, which keeps the arithmetic and not the stores the limit; the hidden
layer is recomputed in the backward. Weight gradients are summed in a fixed number of private parts and then in order,
so the bytes do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

LANES = 64  # points per block
PARTS = 16  # private sums of weight gradients
FAST = {"reassoc", "contract", "nsz", "arcp"}  # no nnan or ninf: non-finite values must stay visible


@njit(inline="always")
def _load(source, low, count, target):
    """Transpose source[low : low + count] into target [columns, LANES], zero beyond count."""
    for column in range(target.shape[0]):
        for p in range(count):
            target[column, p] = source[low + p, column]
        for p in range(count, LANES):
            target[column, p] = np.float32(0)


@njit(fastmath=FAST)
def _product(weights, x, out):
    """out[h] += sum_i weights[h, i] x[i] on [*, LANES] blocks; the number of columns is a multiple of 4."""
    for i in range(0, weights.shape[1], 4):
        for h in range(weights.shape[0]):
            a, b, c, d = weights[h, i], weights[h, i + 1], weights[h, i + 2], weights[h, i + 3]
            for p in range(LANES):
                out[h, p] += a * x[i, p] + b * x[i + 1, p] + c * x[i + 2, p] + d * x[i + 3, p]


@njit(fastmath=FAST)
def _outer(left, right, out):
    """out[h, i] += sum_p left[h, p] right[i, p]; right has a multiple of 4 rows."""
    for h in range(left.shape[0]):
        for i in range(0, right.shape[0], 4):
            a = b = c = d = np.float32(0)
            for p in range(LANES):
                v = left[h, p]
                a += v * right[i, p]
                b += v * right[i + 1, p]
                c += v * right[i + 2, p]
                d += v * right[i + 3, p]
            out[h, i] += a
            out[h, i + 1] += b
            out[h, i + 2] += c
            out[h, i + 3] += d


@njit(parallel=True, cache=True, fastmath=FAST)
def _forward(x, w1, b1, w2, b2, out, slope, with_slope):
    n, inputs, hidden, outputs = x.shape[0], w1.shape[1], w1.shape[0], w2.shape[0]
    zero = np.float32(0)
    w1_t = np.ascontiguousarray(w1.T)
    blocks = (n + LANES - 1) // LANES
    for part in prange(PARTS):
        xt = np.empty((inputs, LANES), np.float32)
        ht = np.empty((hidden, LANES), np.float32)
        st = np.empty((inputs, LANES), np.float32)
        ot = np.empty((outputs, LANES), np.float32)
        for block in range(part * blocks // PARTS, (part + 1) * blocks // PARTS):
            low = block * LANES
            count = min(LANES, n - low)
            _load(x, low, count, xt)
            for h in range(hidden):
                ht[h, :] = b1[h]
            _product(w1, xt, ht)
            for o in range(outputs):
                ot[o, :] = b2[o]
                for h in range(hidden):
                    w = w2[o, h]
                    if w != zero:
                        for p in range(LANES):
                            ot[o, p] += w * max(ht[h, p], zero)
                for p in range(count):
                    out[low + p, o] = ot[o, p]
            if with_slope:
                for h in range(hidden):
                    w = w2[0, h]
                    for p in range(LANES):
                        ht[h, p] = w if ht[h, p] > zero else zero
                st[:] = zero
                _product(w1_t, ht, st)
                for p in range(count):
                    for i in range(inputs):
                        slope[low + p, i] = st[i, p]


@njit(parallel=True, cache=True, fastmath=FAST)
def _backward(x, w1, b1, w2, grad_out, grad_slope, with_slope, gx, gw1, gb1, gw2, gb2):
    n, inputs, hidden, outputs = x.shape[0], w1.shape[1], w1.shape[0], w2.shape[0]
    zero, one = np.float32(0), np.float32(1)
    w1_t = np.ascontiguousarray(w1.T)
    blocks = (n + LANES - 1) // LANES
    for part in prange(PARTS):
        xt = np.empty((inputs, LANES), np.float32)
        st = np.empty((inputs, LANES), np.float32)
        ht = np.empty((hidden, LANES), np.float32)
        kt = np.empty((hidden, LANES), np.float32)
        ot = np.empty((outputs, LANES), np.float32)
        for block in range(part * blocks // PARTS, (part + 1) * blocks // PARTS):
            low = block * LANES
            count = min(LANES, n - low)
            _load(x, low, count, xt)
            _load(grad_out, low, count, ot)
            for h in range(hidden):
                ht[h, :] = b1[h]
            _product(w1, xt, ht)
            if with_slope:  # slope = w1^T (w2[0] m), m = [ht > 0]
                _load(grad_slope, low, count, st)
                kt[:] = zero
                _product(w1, st, kt)
                for h in range(hidden):
                    total = zero
                    w = w2[0, h]
                    for p in range(LANES):
                        m = one if ht[h, p] > zero else zero
                        total += m * kt[h, p]
                        kt[h, p] = m * w
                    gw2[part, 0, h] += total
                _outer(kt, st, gw1[part])
            for o in range(outputs):
                total = zero
                for p in range(LANES):
                    total += ot[o, p]
                gb2[part, o] += total
            for h in range(hidden):
                for o in range(outputs):
                    total = zero
                    for p in range(LANES):
                        total += ot[o, p] * max(ht[h, p], zero)
                    gw2[part, o, h] += total
                kt[h, :] = zero
                for o in range(outputs):
                    w = w2[o, h]
                    if w != zero:
                        for p in range(LANES):
                            kt[h, p] += w * ot[o, p]
                total = zero
                for p in range(LANES):
                    kt[h, p] = kt[h, p] if ht[h, p] > zero else zero
                    total += kt[h, p]
                gb1[part, h] += total
            _outer(kt, xt, gw1[part])
            st[:] = zero
            _product(w1_t, kt, st)
            for p in range(count):
                for i in range(inputs):
                    gx[low + p, i] = st[i, p]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _padded(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and hidden units padded with zeros to multiples of 4, which the kernels' unrolling takes."""
    inputs, hidden = -x.shape[1] % 4, -w1.shape[0] % 4
    if inputs or hidden:
        pad = torch.nn.functional.pad
        return pad(x, (0, inputs)), pad(w1, (0, inputs, 0, hidden)), pad(b1, (0, hidden)), pad(w2, (0, hidden))
    return x, w1, b1, w2


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    """out [N, O] and slope [N, I] (empty [0, I] unless asked for)."""
    n, inputs = x.shape
    padded = _padded(x, w1, b1, w2)
    out = torch.empty(n, w2.shape[0])
    slope = torch.empty(n if with_slope else 0, padded[0].shape[1])
    _forward(*(_array(v) for v in padded), _array(b2), out.numpy(), slope.numpy(), with_slope)
    return out, slope[:, :inputs]


def backward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, grad_out: Tensor, grad_slope: Tensor | None):
    """Gradients in x, w1, b1, w2, b2."""
    (n, inputs), hidden, outputs = x.shape, w1.shape[0], w2.shape[0]
    x, w1, b1, w2 = _padded(x, w1, b1, w2)
    with_slope = grad_slope is not None
    slope = torch.zeros(0, x.shape[1]) if grad_slope is None else grad_slope
    slope = torch.nn.functional.pad(slope, (0, x.shape[1] - slope.shape[1]))
    gx = torch.empty(n, x.shape[1])
    parts = [torch.zeros(PARTS, *shape) for shape in (w1.shape, b1.shape, w2.shape, (outputs,))]
    arrays = (_array(v) for v in (x, w1, b1, w2, grad_out, slope))
    _backward(*arrays, with_slope, gx.numpy(), *(v.numpy() for v in parts))
    gw1, gb1, gw2, gb2 = (v.sum(0) for v in parts)
    return gx[:, :inputs], gw1[:hidden, :inputs], gb1[:hidden], gw2[:, :hidden], gb2
