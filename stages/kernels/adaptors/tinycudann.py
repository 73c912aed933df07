"""tiny-cuda-nn behind our hash grid and perceptron; CUDA, BSD-3-Clause. Written against its versions 1.7 and 2.0.

Hash grid. tiny-cuda-nn's levels have base * growth^l vertices a side, rarely a whole number, and are shifted by half a
cell; ours have whole numbers of cells and end at the box's walls. So each level is a grid of one level:
    vertices     base_resolution = cells + 1 gives it a scale of exactly `cells`, so cells + 1 vertices a side, as ours
    position     it takes p = x scale + 1/2, ours p = x cells: each level gets x - 1/2 / cells in three inputs of its
                 own (rounded so that p never falls below 0, and x = 1 stays in the last cell, as with ours)
    dense        where (cells + 1)^3 rows fit into 2^log2_table, x fastest: the same rule and order
    hash         "CoherentPrime": x ^ y 2654435761 ^ z 805459861 modulo 2^log2_table: the same
    layout       level after level, features of a row side by side; a dense level is padded to a multiple of 8 rows
    precision    float32 throughout; the table's gradient is summed by atomics, in any order
The table stays our parameter [T, F] and is copied into that layout in each call, so a checkpoint is exchangeable with
every other backend. All levels together are one "Composite" encoding, one call. That has no second derivative; a grid
alone has, so hash_gradient asks level by level.

Perceptron. A Network of one hidden layer ("FullyFusedMLP" up to 128 units, else "CutlassMLP"), which has no biases and
computes in half precision. b1 is the weight of one more input that is always 1, b2 is added afterwards in float32;
widths are padded with zero weights. Weights stay our parameters, so checkpoints are exchangeable, but values carry the
rounding of float16, about 1e-3 of the largest, and overflow beyond 65504. Gradients are scaled into the range of half
precision by what they sum to, in every call, and back in float32: those of a mean over 262,144 samples would vanish.

Letters as in hashgrid.py and mlp.py.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from stages.kernels.grid import HashGridSpec

FEATURES = (1, 2, 4, 8)  # features a level that its grid is compiled for
FUSED_WIDTHS = (16, 32, 64, 128)
ALIGNMENT = 16  # of a perceptron's inputs and outputs
ROWS = 8  # a level's rows are a multiple of this
GRADIENT_SUM = 64.0  # times tiny-cuda-nn's own 128 and hidden values up to 8: 65536, where half precision ends


def hash_encode(points: Tensor, table: Tensor, spec: HashGridSpec) -> Tensor:
    """Return [N, L * F] of points [N, 3] and table [T, F]; differentiable in both, once; see hashgrid.hash_encode."""
    _check(spec)
    if not len(points):
        return _nothing(points, table).reshape(0, spec.width)
    local = torch.cat([_local(points, r) for r in spec.resolutions], 1)  # [N, 3 L]
    out = _call(_all_levels(spec, table.device), local, _packed(table, spec))
    return _contiguous_gradient(out)


def hash_gradient(points: Tensor, table: Tensor, spec: HashGridSpec, g: Tensor) -> Tensor:
    """Return J^T g [N, 3], differentiable in table and g by the grid's second derivative; see hashgrid."""
    _check(spec)
    points = points.detach()
    if not len(points):
        return (_nothing(points, table) + g.sum()).reshape(0, 3)
    differentiable = torch.is_grad_enabled() and (table.requires_grad or g.requires_grad)
    inside = ((points >= 0) & (points <= 1)).to(points.dtype)
    total = torch.zeros_like(points)
    levels = zip(spec.resolutions, _split(table, spec), g.split(spec.features, 1))
    for level, (resolution, rows, up) in enumerate(levels):
        with torch.enable_grad():
            local = _local(points, resolution).requires_grad_()
            out = _call(_one_level(spec, level, table.device), local, _padded(rows))
            (slope,) = torch.autograd.grad(out, local, up.contiguous(), create_graph=differentiable)
        total = total + inside * _contiguous_gradient(slope)
    return total


def _check(spec: HashGridSpec) -> None:
    if spec.features not in FEATURES:
        raise ValueError(f"backend: 'tinycudann' takes 1, 2, 4 or 8 features a level, got {spec.features}")


def _nothing(points: Tensor, table: Tensor) -> Tensor:
    """An empty tensor that still sends zeros to points and table; tiny-cuda-nn is not asked about no points."""
    return points.sum(1) + 0 * table.sum()


def _local(points: Tensor, cells: int) -> Tensor:
    """Positions [N, 3] that fma(position, cells, 1/2) brings back to points * cells, within [0, cells)."""
    half, zero, one = np.float32(0.5), np.float32(0), np.float32(1)
    shift = half / np.float32(cells)
    if float(shift) * cells > 0.5:
        shift = np.nextafter(shift, zero)  # rounded up: position 0 would fall below the first vertex
    top = one - shift
    while np.float64(top) * cells + 0.5 >= cells * (1 - 2.0**-24):  # the nearest float32 would be the far wall
        top = np.nextafter(top, zero)
    inside = (points >= 0) & (points <= 1)
    with torch.no_grad():
        position = (points.clamp(0, 1) - float(shift)).clamp(max=float(top))
        position = position + (0 * points).sum(-1, keepdim=True)  # nan where a coordinate is not finite
    return position + torch.where(inside, points - points.detach(), 0)  # the value of position, the slope of a clamp


def _packed(table: Tensor, spec: HashGridSpec) -> Tensor:
    """The table in tiny-cuda-nn's layout, one vector."""
    return torch.cat([_padded(rows) for rows in _split(table, spec)])


def _split(table: Tensor, spec: HashGridSpec) -> tuple[Tensor, ...]:
    """The rows of each level; one split, whose gradient is one concatenation."""
    return table.split([stop - start for start, stop in zip(spec.offsets, spec.offsets[1:])])


def _padded(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % ROWS)).reshape(-1)


def _grid(spec: HashGridSpec, level: int) -> dict:
    return {
        "otype": "Grid",
        "type": "Hash",
        "hash": "CoherentPrime",
        "interpolation": "Linear",
        "n_levels": 1,
        "n_features_per_level": spec.features,
        "log2_hashmap_size": spec.log2_table,
        "base_resolution": spec.resolutions[level] + 1,
        "per_level_scale": 1.0,
    }


@lru_cache(maxsize=8)
def _all_levels(spec: HashGridSpec, device: torch.device):
    import tinycudann as tcnn

    nested = [_grid(spec, level) | {"n_dims_to_encode": 3} for level in range(spec.levels)]
    return tcnn.Encoding(3 * spec.levels, {"otype": "Composite", "nested": nested}, dtype=torch.float32)


@lru_cache(maxsize=64)
def _one_level(spec: HashGridSpec, level: int, device: torch.device):
    import tinycudann as tcnn

    return tcnn.Encoding(3, _grid(spec, level), dtype=torch.float32)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Return [N, O] of x [N, I]; differentiable in every argument, once; see mlp.mlp."""
    (hidden, inputs), outputs = w1.shape, w2.shape[0]
    if not len(x):
        return (x.sum() + 0 * sum(v.sum() for v in (w1, b1, w2))) * x.new_zeros(0, outputs) + b2
    width = next((w for w in FUSED_WIDTHS if w >= hidden), hidden + -hidden % ALIGNMENT)
    kind = "FullyFusedMLP" if width in FUSED_WIDTHS else "CutlassMLP"
    first = torch.cat([w1, b1[:, None]], 1)
    first = torch.nn.functional.pad(first, (0, -(inputs + 1) % ALIGNMENT, 0, width - hidden))
    second = torch.nn.functional.pad(w2, (0, width - hidden, 0, -outputs % ALIGNMENT))
    packed = torch.cat([first.reshape(-1), second.reshape(-1)])
    network = _network(inputs + 1, outputs, width, kind, x.device)
    scale: list[Tensor] = []
    wide = torch.cat([x, x.new_ones(len(x), 1)], 1)
    out = _call(network, _Unscaled.apply(wide, scale), _Unscaled.apply(packed, scale))
    return _Scaled.apply(out, scale) + b2


@lru_cache(maxsize=8)
def _network(inputs: int, outputs: int, width: int, kind: str, device: torch.device):
    import tinycudann as tcnn

    shape = {"otype": kind, "activation": "ReLU", "output_activation": "None", "n_neurons": width, "n_hidden_layers": 1}
    return tcnn.Network(inputs, outputs, shape)


class _Scaled(torch.autograd.Function):
    """float32 of a half-precision output; its gradient g goes back as g s, with s such that |g s| sums to GRADIENT_SUM.

    The weights' gradients are such sums and must not overflow; the single ones must not vanish (below 6e-8).
    """

    @staticmethod
    def forward(ctx, out: Tensor, scale: list[Tensor]) -> Tensor:
        ctx.dtype, ctx.scale = out.dtype, scale
        return out.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        total = grad.abs().sum()
        power = (GRADIENT_SUM / total.clamp_min(torch.finfo(grad.dtype).tiny)).log2().floor().clamp(-60, 60)
        ctx.scale[:] = [power.exp2()]
        return (grad * ctx.scale[0]).to(ctx.dtype).contiguous(), None


class _Unscaled(torch.autograd.Function):
    """The identity; its gradient is divided by what _Scaled multiplied with, which the way back passes first."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: list[Tensor]) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return grad / ctx.scale[0], None


def _call(module: torch.nn.Module, x: Tensor, parameters: Tensor) -> Tensor:
    """A tiny-cuda-nn module on given parameters instead of those it was born with."""
    if parameters.shape != module.params.shape:
        got, want = list(parameters.shape), list(module.params.shape)
        raise ValueError(f"tinycudann: its parameters have shape {want}, ours {got}: another version's layout?")
    return functional_call(module, {"params": parameters}, (x,))


def _contiguous_gradient(x: Tensor) -> Tensor:
    """x, whose gradient arrives contiguous: tiny-cuda-nn refuses any other."""
    if x.requires_grad:
        x.register_hook(lambda grad: grad.contiguous())
    return x
