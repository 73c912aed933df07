"""The small perceptron of mlp.py on the CPU (numba): blocks of points against weights that stay in the first cache.

Every product of matrices goes through vectors.product_tile, tile by tile in registers; the hidden layer is
recomputed in the backward. Sizes are padded with zeros to whole tiles. Weight gradients are summed in a fixed number of
private parts and then in order, so the bytes do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stages.kernels.cpu.jit import njit
from stages.kernels.cpu.threads import each
from stages.kernels.cpu.vectors import COLUMNS, NARROW, ROWS, narrow_product_tile, product_tile

BLOCK = 64  # points, a multiple of ROWS
PARTS = 16  # private sums of weight gradients


@njit
def _rows(start, a, a_first, b, out, first):
    """out [first + p, J] = start [J] + a [a_first + p, K] b [K, J] for p < BLOCK; J a multiple of NARROW."""
    steps, columns = b.shape
    wide = columns - columns % COLUMNS
    for j in range(0, wide, COLUMNS):
        for q in range(0, BLOCK, ROWS):
            c, at = (first + q) * columns + j, (a_first + q) * steps
            product_tile(out, c, columns, start, j, 0, a, at, steps, 1, b, j, columns, steps)
    for j in range(wide, columns, NARROW):
        for q in range(0, BLOCK, ROWS):
            c, at = (first + q) * columns + j, (a_first + q) * steps
            narrow_product_tile(out, c, columns, start, j, 0, a, at, steps, 1, b, j, columns, steps)


@njit
def _add_outer(a, b, out):
    """out [I, J] += a^T b of a [BLOCK, I] and b [BLOCK, J]; I a multiple of ROWS, J of NARROW."""
    high, columns = out.shape
    wide = columns - columns % COLUMNS
    for i in range(0, high, ROWS):
        for j in range(0, wide, COLUMNS):
            c = i * columns + j
            product_tile(out, c, columns, out, c, columns, a, i, 1, high, b, j, columns, BLOCK)
        for j in range(wide, columns, NARROW):
            c = i * columns + j
            narrow_product_tile(out, c, columns, out, c, columns, a, i, 1, high, b, j, columns, BLOCK)


@njit
def _copy_rows(source, low, count, target):
    """target [BLOCK, K] = source[low : low + count], zero beyond."""
    for p in range(BLOCK):
        for k in range(target.shape[1]):
            target[p, k] = source[low + p, k] if p < count else np.float32(0)


@njit
def _write_rows(source, target, low):
    """target [low:] = the first rows of source: what is left of the points."""
    for p in range(low, target.shape[0]):
        for k in range(target.shape[1]):
            target[p, k] = source[p - low, k]


@njit(cache=True, nogil=True)
def _forward(part, x, w1_t, b1, w2_t, b2, v, out, slope):
    """v [H, I] is w2[0] w1, row by row; slope may be empty."""
    n, (inputs, hidden), outputs = x.shape[0], w1_t.shape, w2_t.shape[1]
    zero, one = np.float32(0), np.float32(1)
    blocks = (n + BLOCK - 1) // BLOCK
    tail, none = np.empty((BLOCK, inputs), np.float32), np.zeros(inputs, np.float32)
    h, m = np.empty((BLOCK, hidden), np.float32), np.empty((BLOCK, hidden), np.float32)
    o = np.empty((BLOCK, outputs), np.float32)
    flat, mask = h.reshape(-1), m.reshape(-1)
    for block in range(part * blocks // PARTS, (part + 1) * blocks // PARTS):
        low = block * BLOCK
        count = min(BLOCK, n - low)
        if count == BLOCK:
            _rows(b1, x, low, w1_t, h, 0)
        else:
            _copy_rows(x, low, count, tail)
            _rows(b1, tail, 0, w1_t, h, 0)
        if slope.shape[0] > 0:
            for e in range(flat.shape[0]):
                mask[e] = one if flat[e] > zero else zero
            if count == BLOCK:
                _rows(none, m, 0, v, slope, low)
            else:
                _rows(none, m, 0, v, tail, 0)
                _write_rows(tail, slope, low)
        for e in range(flat.shape[0]):  # what is not a number stays so
            flat[e] = zero if flat[e] <= zero else flat[e]
        _rows(b2, h, 0, w2_t, o, 0)
        for p in range(count):
            for j in range(out.shape[1]):
                out[low + p, j] = o[p, j]


@njit(cache=True, nogil=True)
def _backward(part, x, w1, w1_t, b1, w2, grad_out, grad_slope, gx, gw1, gb1, gw2, gb2, gv):
    n, (hidden, inputs), outputs = x.shape[0], w1.shape, w2.shape[0]
    zero, one = np.float32(0), np.float32(1)
    blocks = (n + BLOCK - 1) // BLOCK
    xs, s = np.empty((BLOCK, inputs), np.float32), np.empty((BLOCK, inputs), np.float32)
    h, k = np.empty((BLOCK, hidden), np.float32), np.empty((BLOCK, hidden), np.float32)
    g, none = np.empty((BLOCK, outputs), np.float32), np.zeros(max(inputs, hidden), np.float32)
    ones = np.ones((BLOCK, ROWS), np.float32)
    flat, back = h.reshape(-1), k.reshape(-1)
    for block in range(part * blocks // PARTS, (part + 1) * blocks // PARTS):
        low = block * BLOCK
        count = min(BLOCK, n - low)
        _copy_rows(grad_out, low, count, g)
        _copy_rows(x, low, count, xs)
        _rows(b1, xs, 0, w1_t, h, 0)
        if grad_slope.shape[0] > 0:
            _copy_rows(grad_slope, low, count, s)
            for e in range(flat.shape[0]):
                back[e] = one if flat[e] > zero else zero
            _add_outer(k, s, gv[part])
        _rows(none, g, 0, w2, k, 0)
        for e in range(flat.shape[0]):
            back[e] = zero if flat[e] <= zero else back[e]
            flat[e] = zero if flat[e] <= zero else flat[e]
        _add_outer(g, h, gw2[part])
        _add_outer(k, xs, gw1[part])
        _add_outer(ones, k, gb1[part])
        for p in range(count):
            for j in range(outputs):
                gb2[part, j] += g[p, j]
        if count == BLOCK:
            _rows(none, k, 0, w1, gx, low)
        else:
            _rows(none, k, 0, w1, s, 0)
            _write_rows(s, gx, low)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _pad(tensor: Tensor, *multiples: int) -> Tensor:
    """The tensor with zeros behind it up to multiples of these sizes, dimension by dimension; itself where it fits."""
    padding = [-size % multiple for size, multiple in zip(tensor.shape, multiples, strict=True)]
    if not any(padding):
        return tensor
    return torch.nn.functional.pad(tensor, [m for pair in ((0, m) for m in reversed(padding)) for m in pair])


def _pad_tiles(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _pad(x, 1, NARROW), _pad(w1, NARROW, NARROW), _pad(b1, NARROW), _pad(w2, NARROW, NARROW)


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    """Return out [N, O] and slope [N, I] (empty [0, I] unless asked for)."""
    n, inputs = x.shape
    out = torch.empty(n, w2.shape[0])
    x, w1, b1, w2 = _pad_tiles(x, w1, b1, w2)
    slope = torch.empty(n if with_slope else 0, x.shape[1])
    arrays = (_array(v) for v in (x, w1.T, b1, w2.T, _pad(b2, NARROW), w2[0][:, None] * w1))
    each(PARTS, _forward, *arrays, out.numpy(), slope.numpy())
    return out, slope[:, :inputs]


def backward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, grad_out: Tensor, grad_slope: Tensor | None):
    """Return gradients in x, w1, b1, w2, b2."""
    (n, inputs), hidden, outputs = x.shape, w1.shape[0], w2.shape[0]
    x, w1, b1, w2 = _pad_tiles(x, w1, b1, w2)
    slope = torch.zeros(0, x.shape[1]) if grad_slope is None else _pad(grad_slope, 1, NARROW)
    gx = torch.empty(n, x.shape[1])
    shapes = (w1.shape, (ROWS, *b1.shape), w2.shape, w2.shape[:1], w1.shape)
    parts = [torch.zeros(PARTS, *shape) for shape in shapes]
    arrays = (_array(v) for v in (x, w1, w1.T, b1, w2, _pad(grad_out, 1, NARROW), slope))
    each(PARTS, _backward, *arrays, gx.numpy(), *(v.numpy() for v in parts))
    gw1, gb1, gw2, gb2, gv = (v.sum(0) for v in parts)
    if grad_slope is not None:  # slope = m v, v = w2[0] w1 row by row
        gw1 = gw1 + w2[0][:, None] * gv
        gw2[0] += (w1 * gv).sum(1)
    return gx[:, :inputs], gw1[:hidden, :inputs], gb1[0, :hidden], gw2[:outputs, :hidden], gb2[:outputs]
