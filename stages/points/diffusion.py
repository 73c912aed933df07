"""The diffusion of point clouds: two noise schedules in 1,024 steps, and the sampler of Karras et al.

Letters: x0 clean clouds, eps unit noise, alpha_bar[t] the share of signal in the variance at step t,
    z_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps,
    x = z_t / sqrt(alpha_bar) = x0 + sigma eps with sigma^2 = (1 - alpha_bar) / alpha_bar: what the sampler moves.
Source: Point-E (arXiv 2212.08751) app. A and its public code; Karras et al. 2022 (arXiv 2206.00364).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 1024
RHO = 7.0  # of Karras' ladder
LEAST, MOST = 1e-3, {"base": 120.0, "up": 160.0}  # ends of the ladder
Denoiser = Callable[[Tensor, float], Tensor]  # x, sigma -> x0


def cosine(steps: int = STEPS) -> Tensor:
    """Return alpha_bar [steps] of the squared cosine, betas at most 0.999 (Nichol & Dhariwal 2021 eq. 17)."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    curve = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
    return torch.cumprod(1 - (1 - curve[1:] / curve[:-1]).clamp_max(0.999), 0)


def linear(steps: int = STEPS) -> Tensor:
    """Return alpha_bar [steps] of linear betas (Ho et al. 2020), scaled to the number of steps."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * 1000 / steps, 0)


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return z_t of x0 [B, K, C] and eps at alpha_bar [B]."""
    alpha_bar = alpha_bar.to(x0)[:, None, None]
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def v_of(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 at alpha_bar [B] (Salimans & Ho 2022 app. D)."""
    alpha_bar = alpha_bar.to(x0)[:, None, None]
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0


def x0_of_v(v: Tensor, x: Tensor, sigma: float) -> Tensor:
    """Return the clean clouds that v says of x = x0 + sigma eps."""
    return x / (1 + sigma**2) - sigma / (1 + sigma**2) ** 0.5 * v


def step_of(sigma: float, alpha_bar: Tensor) -> float:
    """Return the step t, with its fraction, whose noise is sigma; beyond the schedule's ends, the end."""
    levels = ((1 - alpha_bar) / alpha_bar).log() / 2
    value = math.log(sigma)
    above = int(torch.searchsorted(levels, torch.tensor(value, dtype=levels.dtype)))
    if above in (0, len(levels)):
        return float(min(above, len(levels) - 1))
    low, high = float(levels[above - 1]), float(levels[above])
    return above - 1 + (value - low) / (high - low)


def ladder(steps: int, most: float, least: float = LEAST) -> list[float]:
    """Return the noise levels of a sampling in `steps` steps, falling, and 0 at the end (Karras et al. eq. 5)."""
    ends = most ** (1 / RHO), least ** (1 / RHO)
    shares = [k / max(1, steps - 1) for k in range(steps)]
    return [(ends[0] + share * (ends[1] - ends[0])) ** RHO for share in shares] + [0.0]


def churned(x: Tensor, sigma: float, churn: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Return x with fresh noise added, and its level (Karras et al. alg. 2).

    Args:
        churn: by which share the level rises; at most sqrt(2) - 1 is taken.
        generator: on the CPU; not asked where churn is 0.
    """
    churn = min(churn, math.sqrt(2) - 1)
    if churn == 0:
        return x, sigma
    higher = sigma * (1 + churn)
    noise = torch.randn(x.shape, generator=generator).to(x)
    return x + math.sqrt(higher**2 - sigma**2) * noise, higher


def heun(x: Tensor, sigma: float, after: float, denoise: Denoiser) -> tuple[Tensor, Tensor]:
    """Return x one level down, and the x0 predicted on the way: Heun's second order, Euler's at the end (alg. 1)."""
    x0 = denoise(x, sigma)
    slope = (x - x0) / sigma
    moved = x + (after - sigma) * slope
    if after == 0:
        return moved, x0
    x0 = denoise(moved, after)
    return x + (after - sigma) * (slope + (moved - x0) / after) / 2, x0


def guided(with_condition: Tensor, without: Tensor, scale: float) -> Tensor:
    """Return the guided x0: without + scale (with - without) (Ho & Salimans 2022)."""
    return without + scale * (with_condition - without)
