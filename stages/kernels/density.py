"""Hash grid and perceptron as one scalar field with its spatial gradient: the op behind analytic normals.

raw(p) = mlp(encode(p)) and grad raw(p) = J(p)^T slope(encode(p)), see hashgrid.py and mlp.py. Composing those two ops
gives the same; one op for all of it walks the table once instead of twice on the way back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.kernels.backend import choose_backend
from stages.kernels.dispatch import module
from stages.kernels.grid import HashGridSpec
from stages.kernels.hashgrid import check_grid, hash_encode, hash_gradient
from stages.kernels.mlp import check_weights, mlp_with_slope
from stages.kernels.untraced import stepped_over, untraced

Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # w1 [H, W], b1 [H], w2 [1, H], b2 [1], as mlp takes them


def hash_density(
    points: Tensor,
    table: Tensor,
    spec: HashGridSpec,
    weights: Weights,
    *,
    known: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a scalar field and its gradient by position.

    Args:
        points: [N, 3] in [0, 1].
        table: [T, F].
        spec: the grid's shape.
        weights: of a perceptron with one output.
        known: as in hash_encode.
        backend: as in hash_encode; tinycudann computes the grid alone, see mlp_with_slope.
    Returns: features [N, L * F], raw [N], gradient [N, 3]; differentiable in table and weights.
    Not differentiable in: points.
    """
    points = points.detach()
    check_weights(spec.width, *weights, outputs=1)
    backends = {
        check_grid(points, table, spec, backend, known=known),
        choose_backend(backend, points, *weights, family="mlp"),
    }
    if backends in ({"numba"}, {"warp"}):
        return untraced(_Density.apply, points, table, *weights, spec, known, backends.pop())
    features = hash_encode(points, table, spec, known=known, backend=backend)
    raw, slope = mlp_with_slope(features, *weights, backend=backend)
    return features, raw[:, 0], hash_gradient(points, table, spec, slope, backend=backend)


class _Density(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, table, w1, b1, w2, b2, spec, known, backend):
        grid, perceptron = module(backend, "hashgrid"), module(backend, "mlp")
        features = grid.encode(points, table, spec) if known is None else known.view_as(known)
        raw, slope = perceptron.forward(features, w1, b1, w2, b2, True)
        ctx.save_for_backward(points, table, features, slope, w1, b1, w2)
        ctx.spec, ctx.backend = spec, backend
        ctx.set_materialize_grads(False)
        return features, raw[:, 0], grid.gradient(points, table, spec, slope)

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_features, g_raw, g_gradient):
        grid, perceptron = module(ctx.backend, "hashgrid"), module(ctx.backend, "mlp")
        points, table, features, slope, w1, b1, w2 = ctx.saved_tensors
        g_slope = None if g_gradient is None else grid.directional(points, table, ctx.spec, g_gradient)
        g_raw = points.new_zeros(points.shape[0]) if g_raw is None else g_raw
        g_encoded, *g_weights = perceptron.backward(features, w1, b1, w2, g_raw[:, None], g_slope)
        if g_features is not None:
            g_encoded = g_encoded.add_(g_features)
        up = None if g_gradient is None else slope
        g_table = grid.scatter(points, ctx.spec, g_encoded, up, g_gradient)
        return None, g_table, *g_weights, None, None, None
