"""What the tests of the model families ask a prior."""

import torch

from stages.guidance.prior import add_noise

PROMPTS = ["a red mug, front view", "a blue cat"]


def problem(prior, seed=0):
    """(x, eps, t, z_t) of two random pictures."""
    generator = torch.Generator().manual_seed(seed)
    x = prior.encode(torch.rand(2, 64, 64, 3, generator=generator), generator).detach()
    t, eps = torch.tensor([150, 700]), torch.randn(x.shape, generator=generator)
    return x, eps, t, add_noise(x, eps, prior.alphas_cumprod[t])
