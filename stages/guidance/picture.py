"""Pictures that a prior draws of a prompt, by DDIM under classifier-free guidance."""

from __future__ import annotations

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

    Timesteps are evenly spaced from the last one down; the move after the lowest one goes to clean data.

    Args:
        conditions: texts of the B views.
        scale: of the guidance, against the negative prompt.
        generator: on the CPU.
    """
    alphas, total, count = prior.alphas_cumprod, prior.alphas_cumprod.shape[0], len(views)
    times = torch.linspace(total - 1, 0, steps + 1).round().long()[:-1]
    following = torch.cat([alphas[times[1:]], alphas.new_ones(1)])
    blank = prior.encode(torch.zeros(count, prior.resolution, prior.resolution, 3), generator)
    z = torch.randn(blank.shape, generator=generator).to(blank)
    context = ViewContext(views, torch.full((3,), GREY, device=views.c2w.device)).repeat(2)
    for t, after in zip(times, following, strict=True):
        asked = t.repeat(2 * count)
        told, device_t = conditions.on_device(z.device, asked[:count])
        asked = device_t.repeat(2) if prior.reads_t_anywhere else asked
        eps = prior.predict_noise(z.repeat(2, 1, 1, 1), asked, told.embedding("prompt", "negative"), context)
        eps_y, eps_0 = eps.to(z.dtype).chunk(2)
        z = ddim_step(z, classifier_free_guidance(eps_y, eps_0, scale), alphas[t].repeat(count), after.repeat(count))
    return prior.decode(z).float().clamp(0, 1)
