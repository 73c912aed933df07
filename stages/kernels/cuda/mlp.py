"""The small perceptron of mlp.py in Warp: one thread a point, its input and its slope in registers.

The numbers of inputs and of outputs (rounded up to 4) are constants of a module that is built for each pair on first
use. Hidden units are a loop, so any number of them does without a module of its own. All threads read a row of the
first layer at once, in 16-byte pieces, from L1. Inputs are read with their own strides: encodings come feature by
feature from cuda/hashgrid.py, so a warp reads 32 neighbours.

The backward recomputes the hidden layer and writes it and its gradient, unit by unit. The weights' gradients are then
matrix products of these over the points; they are left to torch, in pieces of PIECE points added in order, so that
their bytes repeat. torch's own setting decides whether those products may use TF32.

With M [H, I] = sum over points of [hidden > 0] (outer) upstream of the slope, the slope w1^T (w2[0] * [hidden > 0])
has the gradients w2[0] * M (by rows) in w1, and the row sums of w1 * M in w2[0].
"""

# annotations stay objects here: Warp reads those of functions made inside a function
from functools import lru_cache
from types import SimpleNamespace

import torch
import warp as wp
from torch import Tensor

from stages.kernels.cuda.launch import MLP_MAX, launch

THREADS = 128  # a block; at up to 168 registers a thread, three blocks fit an SM
PIECE = 2048  # points of a partial sum: 2^18 points give 128, about one an SM

LOAD_ROW = """
    wp::vec_t<WIDTH, wp::float32> row;
    const wp::float32* from = weights.data + size_t(h) * WIDTH;
    for (int i = 0; i < WIDTH; i += 4) {
#if defined(__CUDA_ARCH__)
        asm("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
            : "=f"(row[i]), "=f"(row[i + 1]), "=f"(row[i + 2]), "=f"(row[i + 3]) : "l"(from + i));
#else
        for (int k = i; k < i + 4; ++k)
            row[k] = from[k];
#endif
    }
    return row;
"""


@lru_cache(maxsize=16)
def kernels(inputs: int, outputs: int) -> SimpleNamespace:
    """Build `forward` and `backward` for so many inputs and outputs (a multiple of 4), in their own module."""
    width = inputs + -inputs % 4
    module = wp.get_module(f"text3d.mlp_{inputs}_{outputs}")
    options = {"enable_backward": False, "max_unroll": MLP_MAX[0], "block_dim": THREADS}
    wp.set_module_options(options, module=module)
    row_type = wp.types.vector(length=width, dtype=wp.float32)
    out_type = wp.types.vector(length=outputs, dtype=wp.float32)

    register = wp.kernel(grid_stride=False, module=module)

    @wp.func_native(LOAD_ROW.replace("WIDTH", str(width)))
    def load_row(weights: wp.array2d(dtype=wp.float32), h: int) -> row_type: ...

    @wp.func_native(LOAD_ROW.replace("WIDTH", str(outputs)))
    def load_out(weights: wp.array2d(dtype=wp.float32), h: int) -> out_type: ...

    @register
    def forward(
        x: wp.array2d(dtype=wp.float32),
        w1: wp.array2d(dtype=wp.float32),
        b1: wp.array(dtype=wp.float32),
        w2: wp.array2d(dtype=wp.float32),
        b2: wp.array(dtype=wp.float32),
        out: wp.array2d(dtype=wp.float32),
        slope: wp.array2d(dtype=wp.float32),
    ):
        p = wp.tid()
        point, along = row_type(), row_type()
        for i in range(wp.static(inputs)):
            point[i] = x[p, i]
        total = out_type()
        for h in range(w1.shape[0]):
            row, onward = load_row(w1, h), load_out(w2, h)
            unit = wp.dot(row, point) + b1[h]
            if not (unit <= 0.0):  # nan goes on
                total += unit * onward
            if unit > 0.0:
                along += onward[0] * row
        for o in range(wp.static(outputs)):
            if o < out.shape[1]:
                out[p, o] = total[o] + b2[o]
        if slope.shape[0] > 0:
            for i in range(wp.static(inputs)):
                slope[p, i] = along[i]

    @register
    def backward(
        x: wp.array2d(dtype=wp.float32),
        w1: wp.array2d(dtype=wp.float32),
        b1: wp.array(dtype=wp.float32),
        w2: wp.array2d(dtype=wp.float32),
        g_out: wp.array2d(dtype=wp.float32),
        gx: wp.array2d(dtype=wp.float32),
        hidden: wp.array2d(dtype=wp.float32),
        g_hidden: wp.array2d(dtype=wp.float32),
        active: wp.array2d(dtype=wp.float32),
    ):
        p = wp.tid()
        point, total = row_type(), row_type()
        for i in range(wp.static(inputs)):
            point[i] = x[p, i]
        upstream = out_type()
        for o in range(wp.static(outputs)):
            if o < g_out.shape[1]:
                upstream[o] = g_out[p, o]
        for h in range(w1.shape[0]):
            row = load_row(w1, h)
            unit = wp.dot(row, point) + b1[h]
            back = float(0.0)
            if not (unit <= 0.0):
                back = wp.dot(load_out(w2, h), upstream)
                total += back * row
            hidden[h, p] = wp.where(unit <= 0.0, 0.0, unit)
            g_hidden[h, p] = back
            if active.shape[0] > 0:
                active[h, p] = wp.where(unit > 0.0, 1.0, 0.0)
        for i in range(wp.static(inputs)):
            gx[p, i] = total[i]

    return SimpleNamespace(forward=forward, backward=backward, module=module)


def _prepare(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[SimpleNamespace, tuple[Tensor, ...]]:
    """The kernels for these sizes and their inputs: rows of w1 and columns of w2 in whole 16-byte pieces."""
    inputs, outputs = x.shape[1], w2.shape[0]
    pad = torch.nn.functional.pad
    w1, w2 = pad(w1.detach(), (0, -inputs % 4)), pad(w2.detach().T, (0, -outputs % 4))
    rows = tuple(v if v.data_ptr() % 16 == 0 else v.clone() for v in (w1.contiguous(), w2.contiguous()))
    return kernels(inputs, rows[1].shape[1]), (x, rows[0], b1, rows[1])


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    """Return out [N, O] and slope [N, I] (empty [0, I] unless asked for), the slope stored feature by feature."""
    n, inputs = x.shape
    out, slope = x.new_empty(n, w2.shape[0]), x.new_empty(inputs, n if with_slope else 0).T
    compiled, arguments = _prepare(x, w1, b1, w2)
    launch(compiled.forward, n, (*arguments, b2, out, slope), block=THREADS)
    return out, slope


def backward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, grad_out: Tensor, grad_slope: Tensor | None):
    """Return gradients in x, w1, b1, w2, b2."""
    (n, inputs), count = x.shape, w1.shape[0]
    gx, hidden, g_hidden = x.new_empty(inputs, n).T, x.new_empty(count, n), x.new_empty(count, n)
    active = x.new_empty((count, n) if grad_slope is not None else (0, 0))
    compiled, arguments = _prepare(x, w1, b1, w2)
    launch(compiled.backward, n, (*arguments, grad_out, gx, hidden, g_hidden, active), block=THREADS)
    gw1, gw2 = _sum_of_products(g_hidden, x), _sum_of_products(grad_out.T, hidden.T)
    if grad_slope is not None:
        m = _sum_of_products(active, grad_slope)
        gw1 += w2[0, :, None] * m
        gw2[0] += (w1 * m).sum(1)
    return gx, gw1, g_hidden.sum(1), gw2, grad_out.sum(0)


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """left [A, N] times right [N, B] as a sum over pieces of points, [A, B]."""
    full = right.shape[0] - right.shape[0] % PIECE
    total = left[:, full:] @ right[full:]
    if full:
        pieces = (full // PIECE, PIECE)
        lefts, rights = left[:, :full].unflatten(1, pieces), right[:full].unflatten(0, pieces)
        total += torch.bmm(lefts.transpose(0, 1), rights).sum(0)
    return total
