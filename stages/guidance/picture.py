"""Pictures that a prior draws of a prompt, by DDIM under classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.cameras import Views
from stages.guidance.conditions import ViewConditions
from stages.guidance.prior import Prior, ViewContext
from stages.guidance.rules import classifier_free_guidance, ddim_step

GREY = 0.4  # linear backdrop, of a prior that asks for one


@torch.no_grad()
def draw(
    prior: Prior, conditions: ViewConditions, views: Views, steps: int, scale: float, generator: torch.Generator
) -> Tensor:
    """Return sRGB pictures [B, H, W, 3] in [0, 1] (Song et al. 2021 eq. 12, eta 0).

    Args:
        conditions: texts of the B views.
        steps, scale: see ddim; guided against the negative prompt.
        generator: on the CPU.
    """
    count = len(views)
    blank = prior.encode(torch.zeros(count, prior.resolution, prior.resolution, 3), generator)
    z = torch.randn(blank.shape, generator=generator).to(blank)
    names = ("prompt", "negative")[: calls(scale)]
    context = ViewContext(views, torch.full((3,), GREY, device=views.c2w.device)).repeat(len(names))

    def predict(z: Tensor, t: Tensor) -> Tensor:
        texts, device_t = conditions.on_device(z.device, t[:count])
        t = device_t.repeat(len(names)) if prior.reads_t_anywhere else t
        return prior.predict_noise(z, t, texts.embedding(*names), context).to(z.dtype)

    return prior.decode(ddim(predict, prior.alphas_cumprod, z, steps, scale)).float().clamp(0, 1)


def calls(scale: float) -> int:
    """Return how many predictions a guided one takes of each row: two, or one where the scale is 1."""
    return 1 if scale == 1 else 2


def ddim(
    predict: Callable[[Tensor, Tensor], Tensor], alphas_cumprod: Tensor, z: Tensor, steps: int, scale: float
) -> Tensor:
    """Return clean data [B, ...] of noise z (Song et al. 2021 eq. 12, eta 0) under classifier-free guidance.

    Timesteps are evenly spaced from the last one down; the move after the lowest one goes to clean data.

    Args:
        predict: noise [2 B, ...] of z twice and timesteps [2 B], with the prompts and then without; where `calls` says
            so, [B, ...] with the prompts alone.
        alphas_cumprod: [T] of the prior.
        z: [B, ...].
        steps: from 1.
        scale: of the guidance; 1 for none.
    """
    count, total = len(z), alphas_cumprod.shape[0]
    times = torch.linspace(total - 1, 0, steps + 1).round().long()[:-1]
    following = torch.cat([alphas_cumprod[times[1:]], alphas_cumprod.new_ones(1)])
    rows = calls(scale)
    for t, after in zip(times, following, strict=True):
        eps = predict(z.repeat(rows, 1, 1, 1), t.repeat(rows * count))
        if rows == 2:
            eps = classifier_free_guidance(*eps.chunk(2), scale)
        z = ddim_step(z, eps, alphas_cumprod[t].repeat(count), after.repeat(count))
    return z
