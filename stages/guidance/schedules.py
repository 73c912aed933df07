"""Timestep schedules and weightings: which t a step uses, and w_t.

Fractions are of the prior's own steps: t = 0.02 is timestep 20 of 1000. They are no noise levels, since priors differ:
t = 0.5 has alpha_bar 0.28 in Stable Diffusion's schedule, which the papers' numbers are for, 0.49 in the cosine one of
the pocket prior and of DeepFloyd IF, and 0.10 in Stable Diffusion 3's flow with shift 3, whose t = 0.35 is as noisy as
0.5 there (configs/flow.yaml). A paper's noise level is compared by alpha_bar. `progress` in [0, 1] is the share of the
stage done.
A timestep schedule is a function (progress, low, high, u [B] in [0, 1), alphas_cumprod [T]) -> t [B] as fractions;
a weighting is a function alpha_bar [B] -> w_t [B]. Both are chosen by name from a dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stages.guidance.prior import scaled_linear_alphas_cumprod

TimestepSchedule = Callable[[float, float, float, Tensor, Tensor], Tensor]


def stratified(batch: int, generator: torch.Generator) -> Tensor:
    """Draw one uniform number in each of `batch` equal parts of [0, 1), in random order; float64 [batch]."""
    u = torch.rand(batch, generator=generator, dtype=torch.float64)
    return (torch.randperm(batch, generator=generator) + u) / batch


def _uniform(progress: float, low: float, high: float, u: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """t ~ U(low, high), DreamFusion sec. 3.2.3."""
    return low + (high - low) * u


def _linear(progress: float, low: float, high: float, u: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """One t for the batch, falling linearly from high to low (DreamGaussian)."""
    return torch.full_like(u, high - (high - low) * progress)


def _sqrt(progress: float, low: float, high: float, u: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """One t for the batch, falling with the square root of progress (HiFA eq. 8)."""
    return torch.full_like(u, high - (high - low) * math.sqrt(progress))


def dreamtime_table(alphas_cumprod: Tensor, low: float, high: float) -> Tensor:
    """Return DreamTime's share of the run spent at or above each timestep, float64 [T] from 1 at the lowest to ~0.

    W(t) = sqrt((1 - alpha_bar) / alpha_bar) * exp(-(t - m)^2 / (2 s^2)) outside [m2, m1], plain in between, with
    m1 800, m2 500, s1 300, s2 100 of 1000 (arXiv 2306.12422 sec. 4.2 as the project's fact sheet reads it).

    These are timesteps of Stable Diffusion's schedule. On another one as much of the run is spent at each level of
    noise as there, whatever its timestep, and next to none where Stable Diffusion has no such level: a cosine
    schedule ends in noise so strong that W would give it a quarter of the run.
    """
    steps = alphas_cumprod.shape[0]
    alpha_bar = alphas_cumprod.double().clamp(1e-6, 1 - 1e-6)
    w = ((1 - alpha_bar) / alpha_bar).sqrt()
    t = _sd_timesteps(alpha_bar)
    w = w * torch.gradient(t)[0] + 1e-12 if steps > 1 else w
    w = torch.where(t > 800, w * torch.exp(-((t - 800) ** 2) / (2 * 300**2)), w)
    w = torch.where(t < 500, w * torch.exp(-((t - 500) ** 2) / (2 * 100**2)), w)
    fraction = torch.arange(steps, dtype=torch.float64) / steps
    w = torch.where((fraction >= low) & (fraction <= high), w, torch.zeros_like(w))
    tail = w.flip(0).cumsum(0).flip(0)
    return tail / tail[0]


def _sd_timesteps(alpha_bar: Tensor) -> Tensor:
    """Return the timesteps of 1000, with fractions, where Stable Diffusion's schedule has alpha_bar [B]."""
    sd_alphas_cumprod = scaled_linear_alphas_cumprod().double()
    snr, levels = torch.logit(alpha_bar), torch.logit(sd_alphas_cumprod).flip(0)  # ascending
    right = torch.searchsorted(levels, snr).clamp(1, len(levels) - 1)
    low, high = levels[right - 1], levels[right]
    position = right - 1 + ((snr - low) / (high - low)).clamp(0, 1)
    return len(levels) - 1 - position


def _dreamtime(progress: float, low: float, high: float, u: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """One t for the batch: the largest t above which DreamTime would have spent `progress` of the run."""
    share = dreamtime_table(alphas_cumprod, low, high)
    reached = torch.nonzero(share >= progress).max().item() / share.shape[0]
    return torch.full_like(u, min(max(reached, low), high))


TIMESTEPS: dict[str, TimestepSchedule] = {
    "uniform": _uniform,
    "linear": _linear,
    "sqrt": _sqrt,
    "dreamtime": _dreamtime,
}

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "sds": lambda alpha_bar: 1 - alpha_bar,  # sigma_t^2, DreamFusion
    "uniform": torch.ones_like,
    "fantasia3d": lambda alpha_bar: alpha_bar.sqrt() * (1 - alpha_bar),
    # sigma_t / alpha_t: turns the noise residual into x - x0_hat, so that high noise, where shapes are decided, counts
    # as much as low noise (the x0 form of SDS, cf. HiFA eq. 6); bounded where the schedule has no signal left
    "x0": lambda alpha_bar: ((1 - alpha_bar) / alpha_bar.clamp_min(1e-3)).sqrt(),
}


def at_or_above_sd_noise(fraction: float, alpha_bar: Tensor) -> Tensor:
    """Return whether noise levels alpha_bar [B] lie at or above a fraction of Stable Diffusion's schedule: [B] bool.

    It applies a threshold that a paper gives as a timestep of that schedule to the schedule of any prior.
    """
    alphas_cumprod = scaled_linear_alphas_cumprod().double()
    k = math.ceil(fraction * len(alphas_cumprod) - 1e-9)
    # halfway to the step before, so that rounding in a folder moves no timestep across
    return alpha_bar.double() < (alphas_cumprod[k - 1] + alphas_cumprod[k]) / 2


def to_index(fraction: Tensor, low: float, high: float, steps: int) -> Tensor:
    """Return integer timesteps [B] of fractions, clamped to those in [low, high]."""
    first = min(math.ceil(low * steps - 1e-9), steps - 1)
    last = max(first, min(math.floor(high * steps + 1e-9), steps - 1))
    return (fraction * steps).round().long().clamp(first, last)
