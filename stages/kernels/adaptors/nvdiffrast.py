"""nvdiffrast behind our rasteriser ops; CUDA, float32. Its licence allows non-commercial use only.

How the conventions meet (nvdiffrast 0.3 and 0.4; Laine et al. 2020):
    rows       its row 0 is the bottom one, ours the top: it is given clip coordinates with y negated, in rasterise and
               in antialias, so its images are ours without being flipped in memory. Mirrored triangles wind the other
               way, which changes nothing: no face is culled, and at a silhouette two faces wind against each other
    rast       (u, v, z/w, triangle + 1), u and v the weights of vertices 0 and 1: the same
    texture    its v = 0 is the first row, ours the last: it is given 1 - v; texel centres and clamping are the same
    gradients  of u and v only, none of z/w; silhouettes through antialias: the same
What differs in kind: it snaps vertices to 1/16 pixel, so pixels along edges change hands; it clips triangles that cross
the eye plane, ours leaves them out; its antialias seeks a silhouette among the edges of the nearer pixel's triangle,
ours walks on over triangles smaller than a pixel; its backward passes add up with atomics, so the same seed does not
give the same bytes. It refuses empty input, which goes to the torch twin. Letters as in raster.py.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from stages.kernels.reference import raster as twin


@cache
def context(device: torch.device):
    """Return the rasteriser's buffers, one a device for the life of the process."""
    import nvdiffrast.torch as dr

    return dr.RasterizeCudaContext(device)


def _mirrored(clip: Tensor) -> Tensor:
    return (clip * clip.new_tensor([1.0, -1.0, 1.0, 1.0])).contiguous()


def rasterise(clip: Tensor, triangles: Tensor, height: int, width: int) -> Tensor:
    """Return [B, H, W, 4] of clip [B, V, 4] and triangles [F, 3] int32; see raster.rasterise."""
    import nvdiffrast.torch as dr

    if not clip.numel() or not triangles.numel():
        return twin.rasterise(clip, triangles, height, width)
    buffers = context(clip.device)
    return dr.rasterize(buffers, _mirrored(clip), triangles.contiguous(), (height, width), grad_db=False)[0]


def interpolate(attributes: Tensor, rast: Tensor, triangles: Tensor) -> Tensor:
    """Return [B, H, W, C] of attributes [B or 1, V, C]; see raster.interpolate."""
    import nvdiffrast.torch as dr

    if not attributes.numel() or not rast.numel() or not triangles.numel():
        return twin.interpolate(attributes, rast, triangles)
    return dr.interpolate(attributes.contiguous(), rast.contiguous(), triangles.contiguous())[0]


def antialias(colour: Tensor, rast: Tensor, clip: Tensor, triangles: Tensor) -> Tensor:
    """Blend silhouettes, [B, H, W, C]; see raster.antialias. nvdiffrast finds the topology itself."""
    import nvdiffrast.torch as dr

    if not colour.numel() or not clip.numel() or not triangles.numel():
        return colour.clone()
    return dr.antialias(colour.contiguous(), rast.contiguous(), _mirrored(clip), triangles.contiguous())


def texture(image: Tensor, uv: Tensor) -> Tensor:
    """Return [..., C] of image [H, W, C] at uv [..., 2]; see raster.texture."""
    import nvdiffrast.torch as dr

    if not image.numel() or not uv.numel():
        return twin.texture(image, uv)
    down = torch.stack([uv[..., 0], 1 - uv[..., 1]], -1).nan_to_num(0.0)  # what is not a number: the first texel
    places = down.reshape(1, 1, -1, 2)
    values = dr.texture(image[None].contiguous(), places, filter_mode="linear", boundary_mode="clamp")
    return values.reshape(*uv.shape[:-1], image.shape[-1])
