"""Multiresolution hash encoding and its spatial gradient (Instant NGP), one public op each.

Letters: N points, L levels, F features per level, T table rows over all levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.errors import check_shape
from stages.kernels.backend import check_alike, choose_backend
from stages.kernels.dispatch import module
from stages.kernels.grid import HashGridSpec
from stages.kernels.reference import hashgrid as twin
from stages.kernels.untraced import stepped_over, untraced


def hash_encode(
    points: Tensor, table: Tensor, spec: HashGridSpec, *, known: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Encode points by a multiresolution hash grid, trilinearly; Instant NGP (Müller et al. 2022) sec. 3.

    Args:
        points: [N, 3] float32 in [0, 1]; values outside are clamped and get no gradient. The features of a point that
            is not finite are nan.
        table: [T, F] float32.
        known: [N, L * F], the result for these very points and table where a pass without gradients already has it;
            it is returned as it is, and only the derivative is added. The torch twin computes it again.
        backend: a key of stages.kernels.backend.BACKENDS; numba and warp want F = 2.
    Returns: [N, L * F], level-major. Differentiable in points and table.
    """
    backend = check_grid(points, table, spec, backend, known=known)
    if backend in ("numba", "warp"):
        return untraced(_Encode.apply, points, table, spec, known, backend)
    if backend == "tinycudann":
        from stages.kernels.adaptors import tinycudann

        return untraced(tinycudann.hash_encode, points, table, spec)
    return twin.hash_encode(points, table, spec)


def hash_encode_both(
    points: Tensor,
    tables: tuple[Tensor, Tensor],
    specs: tuple[HashGridSpec, HashGridSpec],
    *,
    backend: str = "auto",
) -> Tensor:
    """Encode points by two grids, side by side: [N, W1 + W2]; arguments as in hash_encode.

    Differentiable in points and both tables.
    """
    backends = {check_grid(points, table, spec, backend) for table, spec in zip(tables, specs, strict=True)}
    if backends == {"numba"}:
        return untraced(_EncodeBoth.apply, points, *tables, *specs)
    parts = [hash_encode(points, table, spec, backend=backend) for table, spec in zip(tables, specs, strict=True)]
    return torch.cat(parts, -1)


def hash_gradient(points: Tensor, table: Tensor, spec: HashGridSpec, g: Tensor, *, backend: str = "auto") -> Tensor:
    """Contract the encoding's derivative by the points with g: J(points)^T g.

    It gives analytic normals of a field whose derivative by the features is g, with gradients that reach the table.
    Args:
        points: [N, 3] in [0, 1], as in hash_encode.
        table: [T, F].
        g: [N, L * F].
    Returns: [N, 3]. Differentiable in table and g. Not differentiable in: points.
    """
    backend = check_grid(points, table, spec, backend, g=g)
    if backend in ("numba", "warp"):
        return untraced(_Gradient.apply, points, table, g, spec, backend)
    if backend == "tinycudann":
        from stages.kernels.adaptors import tinycudann

        return untraced(tinycudann.hash_gradient, points, table, spec, g)
    return twin.hash_gradient(points, table, spec, g)


def check_grid(points: Tensor, table: Tensor, spec: HashGridSpec, backend: str, **features: Tensor | None) -> str:
    """Check the arguments of an op by name, `features` [N, L * F] among them, and choose its backend."""
    check_shape("points", points, (None, 3))
    check_shape("table", table, (spec.rows, spec.features))
    for name, tensor in features.items():
        if tensor is not None:
            check_shape(name, tensor, (points.shape[0], spec.width))
            check_alike(name, tensor, table)
    choice = choose_backend(backend, points, table, family="hash", adaptor=True)
    if choice in ("numba", "warp") and spec.features != 2:
        if backend == choice:
            raise ValueError(f"backend: {choice!r} is written for 2 features a level, got {spec.features}")
        return "torch"
    return choice


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points: Tensor, table: Tensor, spec: HashGridSpec, known: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(points, table)
        ctx.spec, ctx.grid = spec, module(backend, "hashgrid")
        return ctx.grid.encode(points, table, spec) if known is None else known.view_as(known)

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        points, table = ctx.saved_tensors
        grad_points = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_points = ctx.grid.gradient(points, table, ctx.spec, grad)
        if ctx.needs_input_grad[1]:
            grad_table = ctx.grid.encode_backward(points, ctx.spec, grad)
        return grad_points, grad_table, None, None, None


class _EncodeBoth(torch.autograd.Function):
    """Two grids write into one tensor and read its gradient where it lies; to join and split it took 6 ms a step."""

    @staticmethod
    def forward(ctx, points: Tensor, first: Tensor, second: Tensor, spec: HashGridSpec, finer: HashGridSpec) -> Tensor:
        ctx.save_for_backward(points, first, second)
        ctx.specs, ctx.grid = (spec, finer), module("numba", "hashgrid")
        out = points.new_empty(points.shape[0], spec.width + finer.width)
        ctx.grid.encode_into(points, first, spec, out, 0)
        ctx.grid.encode_into(points, second, finer, out, spec.width)
        return out

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        points, *tables = ctx.saved_tensors
        grad = grad.contiguous()
        columns, grad_points, grad_tables = (0, ctx.specs[0].width), None, [None, None]
        for k, (table, spec, column) in enumerate(zip(tables, ctx.specs, columns, strict=True)):
            if ctx.needs_input_grad[0]:
                part = ctx.grid.gradient(points, table, spec, grad[:, column : column + spec.width])
                grad_points = part if grad_points is None else grad_points.add_(part)
            if ctx.needs_input_grad[1 + k]:
                grad_tables[k] = ctx.grid.encode_backward(points, spec, grad, column)
        return grad_points, *grad_tables, None, None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points: Tensor, table: Tensor, g: Tensor, spec: HashGridSpec, backend: str) -> Tensor:
        ctx.save_for_backward(points, table, g)
        ctx.spec, ctx.grid = spec, module(backend, "hashgrid")
        return ctx.grid.gradient(points, table, spec, g)

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        points, table, g = ctx.saved_tensors
        grad_table = grad_g = None
        if ctx.needs_input_grad[1]:
            grad_table = ctx.grid.gradient_backward_table(points, ctx.spec, g, grad)
        if ctx.needs_input_grad[2]:
            grad_g = ctx.grid.directional(points, table, ctx.spec, grad)
        return None, grad_table, grad_g, None, None
