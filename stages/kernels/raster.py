"""Rasterisation as differentiable ops: rasterise, interpolate.

The layout is nvdiffrast's (Laine et al. 2020, "Modular primitives for high-performance differentiable rendering",
sec. 3), with ROW 0 AT THE TOP. Letters: B views, V vertices, F triangles, H rows, W columns, C channels.
`backend` is a key of stages.kernels.backend.BACKENDS; the torch twin in reference_raster.py defines every result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.errors import check_shape
from stages.kernels import reference_raster as twin
from stages.kernels.backend import choose_backend

TRIANGLES_MAX = 1 << 24  # ids travel as float32, exact up to here


def rasterise(clip: Tensor, triangles: Tensor, height: int, width: int, *, backend: str = "auto") -> Tensor:
    """Visible triangle at every pixel centre, with perspective-correct barycentrics.

    Args:
        clip: [B, V, 4] OpenGL clip coordinates. triangles: [F, 3] int32 into V. height, width: pixels.
    Returns: [B, H, W, 4] = (u, v, z/w, triangle + 1), zeros where nothing is. u and v weigh vertices 0 and 1 of the
        triangle, vertex 2 has 1 - u - v. Both faces are drawn; of equal depths the lower triangle wins. Left out: a
        triangle with a vertex at w <= 1e-6 (behind the eye), projecting beyond 1e12 pixels or not finite, or with a
        screen area below 1e-8 pixels; of the others, the pixels whose z/w lies outside [-1, 1], so a triangle that
        crosses the near plane in front of the eye is cut there.
    Not differentiable in: z/w and the triangle, so not across silhouettes; u and v are differentiable in clip.
    Raises: ValueError naming argument, wanted and got.
    """
    check_shape("clip", clip, (None, None, 4))
    _check_triangles(triangles, clip.shape[1])
    _check_float("clip", clip)
    if height < 1 or width < 1:
        raise ValueError(f"height, width: wanted at least 1 pixel, got {height} x {width}")
    if choose_backend(backend, clip) == "torch":
        return twin.rasterise(clip, triangles, height, width)
    return _Rasterise.apply(clip, triangles, height, width)


def interpolate(attributes: Tensor, rast: Tensor, triangles: Tensor, *, backend: str = "auto") -> Tensor:
    """Attributes of the visible surface at every pixel.

    Args:
        attributes: [V, C], or [B, V, C] for attributes per view. rast: [B, H, W, 4]. triangles: [F, 3] int32.
    Returns: [B, H, W, C], zeros where no triangle is. Differentiable in attributes and in u, v of rast.
    Raises: ValueError naming argument, wanted and got.
    """
    check_shape("rast", rast, (None, None, None, 4))
    check_shape("attributes", attributes, (None,) * 2 if attributes.ndim == 2 else (rast.shape[0], None, None))
    _check_float("attributes", attributes)
    _check_float("rast", rast)
    _check_triangles(triangles, attributes.shape[-2])
    batched = attributes if attributes.ndim == 3 else attributes[None]
    if choose_backend(backend, attributes, rast) == "torch":
        return twin.interpolate(batched, rast, triangles)
    return _Interpolate.apply(batched, rast, triangles)


def _check_triangles(triangles: Tensor, vertices: int) -> None:
    check_shape("triangles", triangles, (None, 3))
    if triangles.dtype != torch.int32:
        raise ValueError(f"triangles: wanted dtype int32, got {str(triangles.dtype).removeprefix('torch.')}")
    if len(triangles) >= TRIANGLES_MAX:
        raise ValueError(f"triangles: wanted fewer than {TRIANGLES_MAX}, got {len(triangles)}")
    if len(triangles):
        low, high = (int(t) for t in torch.aminmax(triangles))
        if low < 0 or high >= vertices:
            raise ValueError(f"triangles: wanted indices in [0, {vertices}), got {low} to {high}")


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        got = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: wanted dtype float32 (or float64 with the torch backend), got {got}")


def _array(tensor: Tensor):
    return tensor.detach().contiguous().numpy()


class _Rasterise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, clip, triangles, height, width):
        from stages.kernels import cpu_raster

        rast = torch.empty(clip.shape[0], height, width, 4)
        cpu_raster.rasterise_forward(_array(clip), _array(triangles), rast.numpy())
        ctx.mark_non_differentiable(rast)
        return rast


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attributes, rast, triangles):
        from stages.kernels import cpu_raster

        out = torch.empty(*rast.shape[:3], attributes.shape[-1])
        cpu_raster.interpolate_forward(_array(attributes), _array(rast), _array(triangles), out.numpy())
        ctx.mark_non_differentiable(out)
        return out
