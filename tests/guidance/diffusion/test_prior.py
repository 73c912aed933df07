"""The algebra between noise, velocity and clean data, and the context that travels with a batch."""

import pytest
import torch

from stages.cameras import orbit_views
from stages.guidance.prior import (
    ViewContext,
    add_noise,
    eps_from_prediction,
    eps_from_x0,
    path_alphas_cumprod,
    resized,
    scaled_linear_alphas_cumprod,
    x0_from_eps,
)


def problem(alpha_bars=(0.9, 0.4, 0.01)):
    generator = torch.Generator().manual_seed(0)
    alpha_bar = torch.tensor(alpha_bars, dtype=torch.float64)
    x, eps = (torch.randn(len(alpha_bars), 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, eps, alpha_bar, add_noise(x, eps, alpha_bar)


def test_noise_velocity_and_clean_data_are_the_same_information():
    x, eps, alpha_bar, z_t = problem()
    v = alpha_bar.sqrt().view(-1, 1, 1, 1) * eps - (1 - alpha_bar).sqrt().view(-1, 1, 1, 1) * x
    torch.testing.assert_close(eps_from_prediction(v, z_t, alpha_bar, "v_prediction"), eps)
    torch.testing.assert_close(eps_from_prediction(x, z_t, alpha_bar, "sample"), eps)
    torch.testing.assert_close(x0_from_eps(eps, z_t, alpha_bar), x)
    torch.testing.assert_close(eps_from_x0(x, z_t, alpha_bar), eps)
    assert eps_from_prediction(eps, z_t, alpha_bar, "epsilon") is eps


def test_velocity_at_zero_signal_to_noise_gives_the_noise_itself():
    x, eps, alpha_bar, z_t = problem((0.0,))
    torch.testing.assert_close(eps_from_prediction(-x, z_t, alpha_bar, "v_prediction"), eps)
    assert torch.isfinite(x0_from_eps(eps, z_t, alpha_bar)).all()


def test_unknown_prediction_type_names_the_known_ones():
    x, eps, alpha_bar, z_t = problem()
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample.*'score'"):
        eps_from_prediction(eps, z_t, alpha_bar, "score")


def test_rectified_flow_is_a_variance_preserving_path_with_the_same_noise():
    x, eps, _, _ = problem((0.5,))
    s = torch.tensor([0.3], dtype=torch.float64)
    flow = (1 - s) * x + s * eps
    alpha_bar = path_alphas_cumprod(1 - s, s)
    z_t = flow / ((1 - s) ** 2 + s**2).sqrt()
    torch.testing.assert_close(z_t, add_noise(x, eps, alpha_bar))
    torch.testing.assert_close(eps_from_x0(x, z_t, alpha_bar), eps)


def test_scaled_linear_schedule_is_stable_diffusions():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(scaled_linear_alphas_cumprod(), theirs, rtol=2e-5, atol=1e-7)


def test_context_repeats_views_and_backgrounds_together():
    views = orbit_views([10.0, 200.0])
    backdrop = torch.rand(2, 4, 4, 3)
    twice = ViewContext(views, backdrop).repeat(2)
    assert twice.views.azimuth_deg.tolist() == [10.0, 200.0, 10.0, 200.0]
    torch.testing.assert_close(twice.backdrop[2:], backdrop)
    colour = torch.tensor([0.1, 0.2, 0.3])
    assert ViewContext(views, colour).repeat(3).backdrop is colour


def test_resizing_keeps_a_constant_image_and_the_mean_of_any():
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert resized(images, 32) is images
    torch.testing.assert_close(resized(images, 16).mean(), images.mean(), atol=2e-3, rtol=0)
    torch.testing.assert_close(resized(torch.full((1, 3, 8, 8), 0.3), 64), torch.full((1, 3, 64, 64), 0.3))
