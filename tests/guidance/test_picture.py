"""Pictures that a prior draws: distributed as its data are, guided away from nothing, the same for a seed."""

from __future__ import annotations

import torch

from stages.cameras import orbit_views
from tests.guidance.gaussian_prior import make

VIEWS = orbit_views([0.0] * 32, 20.0)


def drawn(seed: int = 0, scale: float = 1.0, negative: str = "") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return make(negative).picture(VIEWS, steps=50, scale=scale, generator=generator)


def test_pictures_have_the_priors_mean_and_spread():
    """x is N(0.5, 0.3^2) in [-1, 1], so pictures are N(0.75, 0.15^2), cut at 1."""
    pictures = drawn()
    assert pictures.shape == (32, 8, 8, 3) and pictures.min() >= 0 and pictures.max() <= 1
    median = pictures.median()
    lower = (median - pictures.flatten().quantile(0.1587)).item()  # one deviation below
    assert abs(float(median) - 0.75) < 0.02 and abs(lower - 0.15) < 0.02


def test_guidance_moves_away_from_what_is_not_wanted():
    assert drawn(scale=2.0).median() > drawn().median() + 0.05
    assert drawn(scale=2.0, negative="bad").median() < drawn().median()  # nothing is darker, "bad" is brighter


def test_pictures_are_the_seeds():
    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))
