"""What generator and discriminators minimise. Letters: B pictures, D the two discriminators, x pictures.

    G  mean f(-D(fake))                          f = softplus: the non-saturating loss (Goodfellow et al. 2014)
    D  mean f(D(fake)) + f(-D(real))  + R1
    R1 = gamma / 2 mean |grad_x D(real)|^2       of each tower (Mescheder et al. 2018, arXiv 1801.04406, eq. 9)
Source: GET3D (arXiv 2209.11163) eq. 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_loss(fake: Tensor) -> Tensor:
    """Return the generator's loss of logits [B, 2] of its pictures."""
    return F.softplus(-fake).mean(0).sum()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminators' loss of logits [B, 2] of real and generated pictures, without R1."""
    return (F.softplus(-real) + F.softplus(fake)).mean(0).sum()


def r1(discriminator: Callable[[Tensor], Tensor], pictures: Tensor, gamma: float) -> Tensor:
    """Return gamma / 2 times the mean squared gradient of the logits at real pictures.

    Args:
        discriminator: from pictures [B, C, H, W] to logits [B, 2], twice differentiable; one logit's gradient is
            squared at a time.
        pictures: real ones.
    """
    pictures = pictures.detach().requires_grad_()
    logits = discriminator(pictures)
    total = pictures.new_zeros(())
    for k in range(logits.shape[1]):
        (gradient,) = torch.autograd.grad(logits[:, k].sum(), pictures, create_graph=True)
        total = total + gradient.square().sum((1, 2, 3)).mean()
    return gamma / 2 * total
