"""Rasterisation as differentiable ops: rasterise, interpolate, antialias, texture, and vertex normals.

The layout is nvdiffrast's (Laine et al. 2020, "Modular primitives for high-performance differentiable rendering",
sec. 3), with ROW 0 AT THE TOP. Letters: B views, V vertices, F triangles, H rows, W columns, C channels.
`backend` is a key of stages.kernels.backend.BACKENDS; the torch twin in reference/raster.py defines every result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.errors import check_shape
from stages.kernels.backend import choose_backend
from stages.kernels.dispatch import module
from stages.kernels.indices import check_indices, set_extent
from stages.kernels.reference import antialias as reference_antialias
from stages.kernels.reference import raster as twin
from stages.kernels.untraced import stepped_over, untraced

TRIANGLES_MAX = 1 << 24  # ids travel as float32, exact up to here


def rasterise(clip: Tensor, triangles: Tensor, height: int, width: int, *, backend: str = "auto") -> Tensor:
    """Find the visible triangle at every pixel centre, with perspective-correct barycentrics.

    Args:
        clip: [B, V, 4] OpenGL clip coordinates.
        triangles: [F, 3] int32 into V.
        height: of the pictures, pixels.
        width: of the pictures, pixels.
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
    backend = choose_backend(backend, clip, family="raster", adaptor=True)
    if backend == "torch":
        return twin.rasterise(clip, triangles, height, width)
    if backend == "nvdiffrast":
        from stages.kernels.adaptors import nvdiffrast

        return untraced(nvdiffrast.rasterise, clip, triangles, height, width)
    return untraced(_Rasterise.apply, clip, triangles, height, width, backend)


def interpolate(attributes: Tensor, rast: Tensor, triangles: Tensor, *, backend: str = "auto") -> Tensor:
    """Interpolate the attributes of the visible surface at every pixel.

    Args:
        attributes: [V, C], or [B, V, C] for attributes per view.
        rast: [B, H, W, 4].
        triangles: [F, 3] int32.
    Returns: [B, H, W, C], zeros where no triangle is. Differentiable in attributes and in u, v of rast.
    Raises: ValueError naming argument, wanted and got.
    """
    check_shape("rast", rast, (None, None, None, 4))
    check_shape("attributes", attributes, (None,) * 2 if attributes.ndim == 2 else (rast.shape[0], None, None))
    _check_float("attributes", attributes)
    _check_float("rast", rast)
    _check_triangles(triangles, attributes.shape[-2])
    batched = attributes if attributes.ndim == 3 else attributes[None]
    backend = choose_backend(backend, attributes, rast, family="raster", adaptor=True)
    if backend == "torch":
        return twin.interpolate(batched, rast, triangles)
    if backend == "nvdiffrast":
        from stages.kernels.adaptors import nvdiffrast

        return untraced(nvdiffrast.interpolate, batched, rast, triangles)
    return untraced(_Interpolate.apply, batched, rast, triangles, backend)


def edge_topology(triangles: Tensor, vertices: int, *, backend: str = "auto") -> Tensor:
    """Pair the half-edges of a mesh, for antialias; once per topology (3 ms for 82k triangles).

    Args:
        triangles: [F, 3] int32.
        vertices: how many there are; indices are below it.
        backend: a key of stages.kernels.backend.BACKENDS.
    Returns: [F, 3] int32; half-edge 3 f + k lies opposite corner k of triangle f. -1 where no other triangle or more
        than one shares the edge. Vertices at one place under two indices are two vertices.
    """
    _check_triangles(triangles, vertices)
    backend = choose_backend(backend, triangles.new_empty(0, dtype=torch.float32), family="raster")
    if backend == "torch":
        return reference_antialias.edge_topology(triangles, vertices)
    topology = untraced(_edge_topology, backend, triangles, vertices)
    return set_extent(topology, -1, 3 * len(triangles) - 1)


def antialias(
    colour: Tensor, rast: Tensor, clip: Tensor, triangles: Tensor, topology: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Blend neighbouring pixels across silhouette edges by where the edge crosses between their centres.

    nvdiffrast's analytic antialiasing (Laine et al. 2020, sec. 3.6) with one addition: from the nearer pixel's
    triangle the silhouette is sought over the neighbouring triangles too, so it is found on meshes whose triangles
    are smaller than a pixel. A pair side by side answers to edges steeper than 45 degrees on screen, a pair one above
    the other to the rest, so the summed coverage of a straight edge, and its gradient, is that of the exact area.

    Args:
        colour: [B, H, W, C].
        rast: [B, H, W, 4] of these vertices and triangles.
        clip: [B, V, 4] OpenGL clip coordinates.
        triangles: [F, 3] int32 into V.
        topology: edge_topology(triangles, V).
    Returns: [B, H, W, C]. Differentiable in colour and in clip; this is where silhouette gradients come from.
        A silhouette is an edge with one triangle, with more than two, or between a front and a back face; surfaces
        that cut through each other away from any edge stay jagged and have no gradient there.
    Raises: ValueError naming argument, wanted and got.
    """
    batch, vertices = clip.shape[0], clip.shape[1]
    check_shape("clip", clip, (None, None, 4))
    check_shape("colour", colour, (batch, None, None, None))
    check_shape("rast", rast, (*colour.shape[:3], 4))
    check_shape("topology", topology, (len(triangles), 3))
    for name, tensor in (("colour", colour), ("rast", rast), ("clip", clip)):
        _check_float(name, tensor)
    _check_triangles(triangles, vertices)
    if topology.dtype != torch.int32:
        raise ValueError(f"topology: wanted dtype int32, got {str(topology.dtype).removeprefix('torch.')}")
    check_indices("topology", topology, 3 * len(triangles), start=-1)
    backend = choose_backend(backend, colour, rast, clip, family="raster", adaptor=True)
    if backend == "torch":
        return reference_antialias.antialias(colour, rast, clip, triangles, topology)
    if backend == "nvdiffrast":
        from stages.kernels.adaptors import nvdiffrast

        return untraced(nvdiffrast.antialias, colour, rast, clip, triangles)
    return untraced(_Antialias.apply, colour, rast, clip, triangles, topology, backend)


def texture(image: Tensor, uv: Tensor, *, backend: str = "auto") -> Tensor:
    """Look up a texture bilinearly, clamped at the border.

    Args:
        image: [TH, TW, C], row 0 at the top (v = 1).
        uv: [..., 2], u right and v up; not finite counts as the corner.
    Returns: [..., C]. Differentiable in image and, inside the outermost texel centres, in uv.
    Raises: ValueError naming argument, wanted and got.
    """
    check_shape("image", image, (None, None, None))
    check_shape("uv", uv, (*uv.shape[:-1], 2) if uv.ndim else (2,))
    if 0 in image.shape[:2]:
        raise ValueError(f"image: wanted at least one texel, got shape {list(image.shape)}")
    _check_float("image", image)
    _check_float("uv", uv)
    backend = choose_backend(backend, image, uv, family="raster", adaptor=True)
    if backend == "torch":
        return twin.texture(image, uv)
    if backend == "nvdiffrast":
        from stages.kernels.adaptors import nvdiffrast

        return untraced(nvdiffrast.texture, image, uv)
    return untraced(_Texture.apply, image, uv.reshape(-1, 2), backend).reshape(*uv.shape[:-1], image.shape[2])


def vertex_normals(vertices: Tensor, triangles: Tensor, *, backend: str = "auto") -> Tensor:
    """Return area-weighted unit vertex normals: a vertex's cross products, summed and normalised.

    Args:
        vertices: [V, 3].
        triangles: [F, 3] int32, counter-clockwise seen from outside.
    Returns: [V, 3]; +y, without gradient, at a vertex whose triangles have no area or cancel.
    """
    check_shape("vertices", vertices, (None, 3))
    _check_float("vertices", vertices)
    _check_triangles(triangles, len(vertices))
    backend = choose_backend(backend, vertices, family="raster")
    if backend == "torch":
        return twin.vertex_normals(vertices, triangles)
    return untraced(_VertexNormals.apply, vertices, triangles, backend)


def _check_triangles(triangles: Tensor, vertices: int) -> None:
    check_shape("triangles", triangles, (None, 3))
    if triangles.dtype != torch.int32:
        raise ValueError(f"triangles: wanted dtype int32, got {str(triangles.dtype).removeprefix('torch.')}")
    if len(triangles) >= TRIANGLES_MAX:
        raise ValueError(f"triangles: wanted fewer than {TRIANGLES_MAX}, got {len(triangles)}")
    check_indices("triangles", triangles, vertices)


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        got = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: wanted dtype float32 (or float64 with the torch backend), got {got}")


def _edge_topology(backend: str, triangles: Tensor, vertices: int) -> Tensor:
    return module(backend, "antialias").edge_topology(triangles, vertices)


class _Rasterise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, clip, triangles, height, width, backend):
        rast = clip.new_empty(clip.shape[0], height, width, 4)
        module(backend, "raster").rasterise_forward(clip, triangles, rast)
        ctx.save_for_backward(clip, triangles, rast)
        ctx.backend = backend
        return rast

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return module(ctx.backend, "raster").rasterise_backward(*ctx.saved_tensors, grad), None, None, None, None


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attributes, rast, triangles, backend):
        out = attributes.new_empty(*rast.shape[:3], attributes.shape[-1])
        module(backend, "raster").interpolate_forward(attributes, rast, triangles, out)
        ctx.save_for_backward(attributes, rast, triangles)
        ctx.backend = backend
        return out

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *module(ctx.backend, "raster").interpolate_backward(*ctx.saved_tensors, grad), None, None


class _Antialias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, colour, rast, clip, triangles, topology, backend):
        tensors = (colour, rast, clip, triangles, topology)
        out, ctx.crossings = module(backend, "antialias").antialias_forward(*tensors)
        ctx.save_for_backward(colour, clip)
        ctx.backend = backend
        return out

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        arguments = (*ctx.saved_tensors, ctx.crossings, grad)
        grad_colour, grad_clip = module(ctx.backend, "antialias").antialias_backward(*arguments)
        return grad_colour, None, grad_clip, None, None, None


class _Texture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, uv, backend):
        out = image.new_empty(len(uv), image.shape[2])
        module(backend, "texture").texture_forward(image, uv, out)
        ctx.save_for_backward(image, uv)
        ctx.backend = backend
        return out

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *module(ctx.backend, "texture").texture_backward(*ctx.saved_tensors, grad), None


class _VertexNormals(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vertices, triangles, backend):
        normals = vertices.new_empty(len(vertices), 3)
        length = vertices.new_empty(len(vertices), dtype=torch.float64)
        module(backend, "normals").normals_forward(vertices, triangles, normals, length)
        ctx.save_for_backward(vertices, triangles, normals, length)
        ctx.backend = backend
        return normals

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        vertices = ctx.saved_tensors[0]
        out = torch.zeros_like(vertices, dtype=torch.float64, memory_format=torch.contiguous_format)
        module(ctx.backend, "normals").normals_backward(*ctx.saved_tensors, grad, out)
        return out.float(), None, None
