"""The diffusion of planes: two noise schedules, predictions and their conversions, and the sampler.

Letters: x0 clean planes, z_t noisy ones, t in [0, 1] the share of the way to noise, alpha_bar(t) the share of signal in
the variance, z_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps.

Otherwise than in Rodin: the base predicts v (Salimans & Ho 2022), not eps, and its variance is the posterior's, not
learned: fewer steps of training and of sampling are needed. The upsampler predicts x0, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]  # t [B] in [0, 1] -> alpha_bar [B]
START, END, TAU = 0.0, 3.0, 0.9  # of the sigmoid schedule
FLOOR = 1e-4  # least alpha_bar


def cosine(t: Tensor) -> Tensor:
    """Return alpha_bar of the squared cosine (Nichol & Dhariwal 2021 eq. 17)."""
    return torch.cos((t + 0.008) / 1.008 * math.pi / 2).square().clamp(FLOOR, 1)


def sigmoid(t: Tensor) -> Tensor:
    """Return alpha_bar of the sigmoid schedule from START to END (Chen 2023, arXiv 2301.10972)."""
    high, low = (1 / (1 + math.exp(-value / TAU)) for value in (START, END))
    falling = torch.sigmoid((t * (END - START) + START) / TAU)
    return ((low - falling) / (low - high)).clamp(FLOOR, 1)


def wide(values: Tensor, like: Tensor) -> Tensor:
    """Return [B] as [B, 1, 1, ...], to be multiplied with `like` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return z_t of x0 [B, ...] and eps at alpha_bar [B]."""
    alpha_bar = wide(alpha_bar, x0)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def v_of(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022)."""
    alpha_bar = wide(alpha_bar, x0)
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0


def x0_of_v(v: Tensor, z_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x0 of a predicted v."""
    alpha_bar = wide(alpha_bar, z_t)
    return alpha_bar.sqrt() * z_t - (1 - alpha_bar).sqrt() * v


def guided(with_words: Tensor, without: Tensor, scale: float) -> Tensor:
    """Return the guided prediction: without + scale (with - without) (Ho & Salimans 2022)."""
    return without + scale * (with_words - without)


def times(steps: int) -> list[float]:
    """Return the times of a sampling in `steps` steps, from 1 to 0, ends included."""
    return [1 - k / steps for k in range(steps + 1)]


def next_noise(
    z_t: Tensor, x0: Tensor, t: float, s: float, schedule: Schedule, eta: float, generator: torch.Generator
) -> Tensor:
    """Return z_s of the step from t to s < t, where x0 is predicted: DDIM, eta = 1 DDPM (Song et al. 2021 eq. 12).

    Args:
        z_t: [B, ...]. x0: its prediction.
        schedule: of alpha_bar.
        eta: share of the posterior's standard deviation that is drawn anew, in [0, 1].
        generator: on the CPU; not asked where eta is 0 or s is 0.
    """
    now, then = schedule(torch.tensor([t, s])).tolist()
    eps = (z_t - math.sqrt(now) * x0) / math.sqrt(1 - now)
    if s == 0:
        return x0
    sigma = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
    out = math.sqrt(then) * x0 + math.sqrt(max(0.0, 1 - then - sigma**2)) * eps
    if sigma > 0:
        out = out + sigma * torch.randn(z_t.shape, generator=generator).to(z_t)
    return out
