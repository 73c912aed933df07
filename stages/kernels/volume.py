"""Packed ray marching through an occupancy grid, and emission-absorption compositing.

Letters: R rays, N samples of all rays behind one another; ray r owns samples ray_offsets[r] .. ray_offsets[r + 1].
Optics (Max 1995; Mildenhall et al. 2020, eq. 3): alpha_i = 1 - exp(-sigma_i delta_i), T_i = prod_{j<i} (1 - alpha_j),
weight_i = T_i alpha_i, out = sum w_i value_i, opacity = sum w_i, depth = sum w_i t_i (not divided by the opacity).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stages.errors import check_shape
from stages.kernels.backend import choose_backend
from stages.kernels.dispatch import module
from stages.kernels.reference import volume as twin
from stages.kernels.untraced import stepped_over, untraced


@dataclass(frozen=True)
class Samples:
    """Samples of R rays in ray order, near to far within a ray.

    t [N] distance along the unit ray of the interval's sample; delta [N] interval length; ray_offsets [R + 1] int64.
    """

    t: Tensor
    delta: Tensor
    ray_offsets: Tensor

    def __len__(self) -> int:
        return self.t.shape[0]

    @property
    def counts(self) -> Tensor:
        """Samples of each ray [R]."""
        return self.ray_offsets.diff()

    @cached_property
    def rays(self) -> Tensor:
        """Index of the ray of each sample [N]."""
        index = torch.arange(self.ray_offsets.shape[0] - 1, device=self.t.device)
        return torch.repeat_interleave(index, self.counts, output_size=len(self))


def march(
    rays_o: Tensor,
    rays_d: Tensor,
    occupancy: Tensor,
    step_size: float,
    jitter: Tensor,
    *,
    thin_stride: int = 1,
    backend: str = "auto",
) -> Samples:
    """Sample rays at distances near + (k + jitter) step_size, k = 0, 1, ..., inside occupied cells.

    Thin cells, of value 2, are sampled `thin_stride` times more coarsely: of their steps k only those with
    k = floor(4096 jitter) modulo thin_stride are taken, with `thin_stride` times the interval. Over random jitter that
    leaves every optical depth's mean as it is, and spends little on the halo of low density around an object.

    Args:
        rays_o: [R, 3] origins.
        rays_d: [R, 3] unit directions. near and far are the ray's crossings of the box [-1, 1]^3 (near >= 0). A ray
            without a direction (shorter than 1e-6) or that is not finite has neither, and gets no samples.
        occupancy: [G, G, G] bool or uint8, indexed [x, y, z], over the box: 0 empty, 1 occupied, 2 thin.
        step_size: world length of an interval.
        jitter: [R] in [0, 1).
        thin_stride: at least 1; 1 treats thin as occupied.
        backend: a key of stages.kernels.backend.BACKENDS.
    Returns: packed samples. Not differentiable in: anything.
    Raises: ValueError naming argument, wanted and got.
    """
    check_shape("rays_o", rays_o, (None, 3))
    check_shape("rays_d", rays_d, (rays_o.shape[0], 3))
    check_shape("jitter", jitter, (rays_o.shape[0],))
    check_shape("occupancy", occupancy, (occupancy.shape[0],) * 3)
    if not 0 < step_size < float("inf"):
        raise ValueError(f"step_size: wanted a positive length, got {step_size}")
    if thin_stride < 1:
        raise ValueError(f"thin_stride: wanted at least 1, got {thin_stride}")
    backend = choose_backend(backend, rays_o, rays_d, jitter, family="volume")
    arguments = (rays_o.detach(), rays_d.detach(), occupancy, step_size, jitter.detach(), thin_stride)
    return Samples(*(twin.march(*arguments) if backend == "torch" else untraced(_march, backend, *arguments)))


def composite(
    sigmas: Tensor, values: Tensor, samples: Samples, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Composite packed samples by emission and absorption, one pass per ray with the running transmittance.

    Args:
        sigmas: [N], at least 0.
        values: [N, C].
        samples: as march gives them.
        backend: a key of stages.kernels.backend.BACKENDS.
    Returns: out [R, C], weights [N], opacity [R], depth [R]; all differentiable in sigmas and (out) in values.
    Not differentiable in: samples.
    """
    n = len(samples)
    check_shape("sigmas", sigmas, (n,))
    check_shape("values", values, (n, None))
    backend = choose_backend(backend, sigmas, values, family="volume")
    if backend != "torch":
        packed = (samples.t, samples.delta, samples.ray_offsets)
        return untraced(_Composite.apply, sigmas, values, *packed, backend)
    return twin.composite(sigmas, values, samples.t, samples.delta, samples.ray_offsets)


def cull(
    sigmas: Tensor, samples: Samples, threshold: float, min_optical_depth: float = 0.0, *, backend: str = "auto"
) -> tuple[Tensor, Samples]:
    """Drop samples that cannot be seen, by a density from a cheap pass without gradients.

    Left out are those whose transmittance is below `threshold` (early termination), and those whose own optical
    depth sigma delta is below `min_optical_depth`. One whose density is nan stays, for the picture to show it.
    Args:
        sigmas: [N].
        samples: as march gives them.
        threshold: transmittance, in [0, 1); 0 keeps everything.
        min_optical_depth: at least 0; 0 keeps everything.
        backend: a key of stages.kernels.backend.BACKENDS.
    Returns: indices [M] of the samples kept, ascending, and those samples. Not differentiable in: anything.
    """
    check_shape("sigmas", sigmas, (len(samples),))
    backend = choose_backend(backend, sigmas, family="volume")
    arguments = (sigmas.detach(), samples.delta, samples.ray_offsets, threshold, min_optical_depth)
    index, offsets = twin.cull(*arguments) if backend == "torch" else untraced(_cull, backend, *arguments)
    return index, Samples(samples.t.index_select(0, index), samples.delta.index_select(0, index), offsets)


def _march(backend: str, *arguments):
    return module(backend, "volume").march(*arguments)


def _cull(backend: str, *arguments):
    return module(backend, "volume").cull(*arguments)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sigmas: Tensor, values: Tensor, t: Tensor, delta: Tensor, ray_offsets: Tensor, backend: str):
        ctx.volume = module(backend, "volume")
        out, weights, opacity, depth = ctx.volume.composite(sigmas, values, t, delta, ray_offsets)
        ctx.save_for_backward(sigmas, values, t, delta, ray_offsets)
        ctx.set_materialize_grads(False)
        return out, weights, opacity, depth

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_out, g_weights, g_opacity, g_depth):
        saved = ctx.saved_tensors
        grad_sigmas, grad_values = ctx.volume.composite_backward(*saved, g_out, g_weights, g_opacity, g_depth)
        return grad_sigmas, grad_values, None, None, None, None
