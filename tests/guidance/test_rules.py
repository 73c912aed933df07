"""Each rule on Gaussian data, where its expected gradient is known by hand; the machinery around the rules."""

import pytest
import torch

from stages.cameras import orbit_views
from stages.errors import UserError
from stages.guidance import rules
from stages.guidance.guidance import GuidanceSettings
from stages.guidance.prior import scaled_linear_alphas_cumprod
from stages.kernels.srgb import linear_to_srgb
from tests.guidance.gaussian_prior import EMPTY, NEGATIVE, PROMPT, VIEWS, X0, images, k_of, make, mean_gradient

T = 0.4
A = scaled_linear_alphas_cumprod()[400].item()
K1, K0, KN = (k_of(torch.tensor(A), std).item() for _, std in (PROMPT, EMPTY, NEGATIVE))
D1, D0, DN = (X0 - mean for mean, _ in (PROMPT, EMPTY, NEGATIVE))
AT = dict(t_min=T, t_max=T)
# 64 views x 768 entries: standard error of the mean of eps-like noise of scale up to 5 is 5 / sqrt(49,152) = 0.023
NOISE = 1 / (VIEWS * 768) ** 0.5


@pytest.mark.parametrize(
    ("settings", "negative", "expected", "spread"),
    [
        (dict(rule="sds", scale=1.0), "", K1 * D1, 1.0),
        (dict(rule="sds", scale=5.0), "", -4 * K0 * D0 + 5 * K1 * D1, 5.0),
        (dict(rule="sds", scale=5.0), "bad", -4 * KN * DN + 5 * K1 * D1, 5.0),
        (dict(rule="sjc", scale=5.0), "", -4 * K0 * D0 + 5 * K1 * D1, 6.0),
        (dict(rule="csd", scale=2.0, negative_share=(0.0, 1.0)), "bad", 2 * (K1 * D1 - K0 * D0), 4.0),
        (dict(rule="nfsd", scale=7.5), "bad", K0 * D0 - KN * DN + 7.5 * (K1 * D1 - K0 * D0), 10.0),
    ],
)
def test_monte_carlo_gradient_of_each_rule_is_its_formula(settings, negative, expected, spread):
    got = mean_gradient(make(negative, **AT, **settings))
    assert got == pytest.approx(expected, abs=5 * spread * NOISE)
    assert abs(expected) > 10 * spread * NOISE  # the tolerance could tell it from zero


def test_csd_moves_its_reference_from_the_empty_to_the_negative_prompt():
    guidance = make("bad", rule="csd", scale=2.0, negative_share=(0.0, 1.0, 0.0, 0.5), **AT)
    assert mean_gradient(guidance, progress=0.25) == pytest.approx(
        2 * (K1 * D1 - 0.5 * KN * DN - 0.5 * K0 * D0), abs=20 * NOISE
    )
    assert mean_gradient(guidance, progress=0.9) == pytest.approx(2 * (K1 * D1 - KN * DN), abs=20 * NOISE)


def test_nfsd_takes_the_whole_unconditional_prediction_at_low_noise():
    alpha_bar = scaled_linear_alphas_cumprod()[150]
    k1, k0 = k_of(alpha_bar, PROMPT[1]).item(), k_of(alpha_bar, EMPTY[1]).item()
    got = mean_gradient(make("bad", rule="nfsd", scale=7.5, t_min=0.15, t_max=0.15))
    assert got == pytest.approx(k0 * D0 + 7.5 * (k1 * D1 - k0 * D0), abs=50 * NOISE)


def test_low_noise_of_nfsd_is_a_noise_level_and_not_a_timestep():
    """t = 0.15 of a schedule whose steps are all as noisy as Stable Diffusion's above 0.2 is no low noise."""
    guidance = make("bad", rule="nfsd", scale=7.5, t_min=0.15, t_max=0.15)
    guidance.prior.alphas_cumprod = torch.full((1000,), A)
    expected = K0 * D0 - KN * DN + 7.5 * (K1 * D1 - K0 * D0)
    assert mean_gradient(guidance) == pytest.approx(expected, abs=10 * NOISE)


def test_sds_weight_scales_the_gradient_by_sigma_squared():
    uniform = mean_gradient(make(scale=1.0, **AT))
    assert mean_gradient(make(scale=1.0, **AT, weighting="sds")) == pytest.approx((1 - A) * uniform, rel=1e-4)


def descend(guidance, steps=400, rate=0.5):
    x = torch.full((4, 3, 8, 8), 0.0, requires_grad=True)
    views = orbit_views(torch.arange(4) * 90.0, 10.0)
    tail = []
    for step in range(steps):
        x.grad = None
        guidance((x.permute(0, 2, 3, 1) + 1) / 2, views, step / steps).loss.backward()
        with torch.no_grad():
            x -= rate * 4 * x.grad
        if step > steps // 2:
            tail.append(x.detach().mean().item())
    return sum(tail) / len(tail)


@pytest.mark.slow
def test_fixed_point_of_sds_is_the_mode_whatever_the_timesteps():
    assert descend(make(scale=1.0, weighting="sds")) == pytest.approx(PROMPT[0], abs=0.02)


@pytest.mark.slow
def test_guidance_overshoots_the_mode_by_the_amount_known_for_gaussians():
    scale = 3.0
    # (1 - s) k0 (x - m0) + s k1 (x - m1) = 0
    expected = ((1 - scale) * K0 * EMPTY[0] + scale * K1 * PROMPT[0]) / ((1 - scale) * K0 + scale * K1)
    assert descend(make(scale=scale, **AT), rate=0.1) == pytest.approx(expected, abs=0.03)
    assert expected > PROMPT[0] + 0.3


def test_sdi_inverts_gaussian_data_along_its_exact_flow():
    # probability flow of N(m, s^2): z_t = a m + sqrt(v) / s (x - m); Song et al. 2021
    mean, std = PROMPT
    v = A * std**2 + 1 - A
    z = A**0.5 * mean + v**0.5 / std * (X0 - mean)
    eps_inverted = (z - A**0.5 * X0) / (1 - A) ** 0.5
    expected = (1 - A) ** 0.5 / v * (z - A**0.5 * mean) - eps_inverted
    got = mean_gradient(make(rule="sdi", scale=1.0, inversion_scale=1.0, inversion_steps=50, **AT))
    assert got == pytest.approx(expected, rel=0.05)
    assert abs(expected) > 0.15


def test_ism_is_the_difference_of_two_predictions_on_one_inverted_path():
    guidance = make(rule="ism", scale=7.5, inversion_steps=50, delta=0.1, **AT)
    got = mean_gradient(guidance)
    a_s = scaled_linear_alphas_cumprod()[300].item()
    mean, std = EMPTY

    def eps(z, a, kind):
        return (1 - a) ** 0.5 / (a * kind[1] ** 2 + 1 - a) * (z - a**0.5 * kind[0])

    z_s = a_s**0.5 * mean + (a_s * std**2 + 1 - a_s) ** 0.5 / std * (X0 - mean)  # exact flow to s
    eps_s = eps(z_s, a_s, EMPTY)
    z_t = A**0.5 * (z_s - (1 - a_s) ** 0.5 * eps_s) / a_s**0.5 + (1 - A) ** 0.5 * eps_s
    expected = eps(z_t, A, EMPTY) + 7.5 * (eps(z_t, A, PROMPT) - eps(z_t, A, EMPTY)) - eps_s
    assert got == pytest.approx(expected, rel=0.03)


def test_ddim_step_there_and_back_returns():
    z, eps = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    a, b = torch.tensor([0.9, 0.2], dtype=torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64)
    torch.testing.assert_close(rules.ddim_step(rules.ddim_step(z, eps, a, b), eps, b, a), z)


def test_rescale_gives_the_guided_x0_the_conditional_contrast():
    generator = torch.Generator().manual_seed(0)
    z, eps_y, eps_hat = (torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha_bar = torch.tensor([0.5, 0.1], dtype=torch.float64)
    from stages.guidance.prior import x0_from_eps

    full = rules.rescale_cfg(5 * eps_hat, eps_y, z, alpha_bar, 1.0)
    expected = x0_from_eps(eps_y, z, alpha_bar).std((1, 2, 3))
    torch.testing.assert_close(x0_from_eps(full, z, alpha_bar).std((1, 2, 3)), expected)
    half = rules.rescale_cfg(5 * eps_hat, eps_y, z, alpha_bar, 0.5)
    torch.testing.assert_close(half, (full + 5 * eps_hat) / 2)
    assert rules.rescale_cfg(eps_hat, eps_y, z, alpha_bar, 0.0) is eps_hat


def test_surrogate_has_the_given_gradient_over_the_batch():
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn_like(x)
    rules.surrogate(x, gradient).backward()
    torch.testing.assert_close(x.grad, gradient / 5)


def test_guided_needs_both_branches_unless_the_scale_is_one():
    eps = torch.randn(1, 3, 2, 2)
    assert rules.classifier_free_guidance(eps, None, 1.0) is eps
    with pytest.raises(ValueError, match="scale: wanted 1 .* got 7.5"):
        rules.classifier_free_guidance(eps, None, 7.5)


def test_one_network_call_per_step_and_no_unconditional_branch_at_scale_one():
    for scale, size in ((1.0, 4), (7.5, 8)):
        guidance = make(scale=scale)
        guidance(images(batch=4), orbit_views(torch.arange(4) * 90.0), 0.0)
        assert guidance.prior.calls == [size]


def test_gradient_clamp_ramps_with_progress():
    guidance = make(scale=1.0, grad_clip=(0.01, 0.03), **AT)
    for progress, limit in ((0.0, 0.01), (0.5, 0.02), (1.0, 0.03)):
        picture = images(batch=2)
        guidance(picture, orbit_views([0.0, 90.0]), progress).loss.backward()
        assert picture.grad.abs().max().item() == pytest.approx(2 * limit / 2, rel=1e-3)


def test_linear_renders_reach_the_prior_as_srgb():
    calls = []
    guidance = make(scale=1.0, srgb=True, **AT)
    encode = guidance.prior.encode
    guidance.prior.encode = lambda x, generator: calls.append(x) or encode(x, generator)
    picture = torch.rand(1, 8, 8, 3, requires_grad=True)
    guidance(picture, orbit_views([0.0]), 0.0).loss.backward()
    torch.testing.assert_close(calls[0], linear_to_srgb(picture))
    assert torch.isfinite(picture.grad).all() and picture.grad.abs().min() > 0


def test_restored_state_gives_the_same_losses_as_going_on():
    views, picture = orbit_views([0.0, 90.0]), images(batch=2)
    guidance, later = make(), make(seed=99)
    for _ in range(3):
        guidance(picture, views, 0.1)
    later.load_state_dict({k: v.clone() for k, v in guidance.state_dict().items()})
    for progress in (0.2, 0.3):
        assert guidance(picture, views, progress).loss == later(picture, views, progress).loss
    fresh = make(seed=99)
    assert fresh(picture, views, 0.3).loss != guidance(picture, views, 0.3).loss


def test_annealing_lowers_the_highest_timestep():
    guidance = make(t_min=0.02, t_max=(0.98, 0.5, 0.0, 0.5))
    views = orbit_views(torch.arange(VIEWS) * 5.0)
    early = guidance(images(side=2), views, 0.0).metrics
    late = guidance(images(side=2), views, 0.7).metrics
    assert early["t_max"] == 0.98 and late["t_max"] == 0.5
    assert early["t"] == pytest.approx(0.5, abs=0.02) and late["t"] == pytest.approx(0.26, abs=0.02)


def test_agreement_is_higher_near_the_mode():
    guidance = make(scale=1.0, t_min=0.5, t_max=0.5)
    views = orbit_views(torch.arange(VIEWS) * 5.0)
    near = guidance(images(PROMPT[0]), views, 0.0).metrics["agreement_db"]
    far = guidance(images(-1.0), views, 0.0).metrics["agreement_db"]
    assert near > far + 10


def test_nonfinite_predictions_are_dropped_counted_and_refused_when_there_is_nothing_else():
    guidance = make(scale=1.0)
    plain = guidance.prior.predict_noise

    def partly(z_t, t, embedding, context):
        eps = plain(z_t, t, embedding, context).clone()
        eps[0] = float("nan")
        return eps

    guidance.prior.predict_noise = partly
    picture = images(batch=2)
    output = guidance(picture, orbit_views([0.0, 90.0]), 0.0)
    output.loss.backward()
    assert output.metrics["nonfinite"] == 0.5 and torch.isfinite(picture.grad).all()
    assert picture.grad[0].abs().max() == 0 and picture.grad[1].abs().max() > 0
    assert all(torch.isfinite(torch.tensor(v)) for v in output.metrics.values())
    guidance.prior.predict_noise = lambda z_t, *rest: torch.full_like(z_t, float("inf"))
    with pytest.raises(UserError, match="no finite number"):
        guidance(images(batch=2), orbit_views([0.0, 90.0]), 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(t_min=0.9, t_max=0.1), "t_min, t_max: at 0 of the stage"),
        (dict(t_min=0.6, t_max=(0.9, 0.5)), "low above high"),
        (dict(rule="sdss"), "sds"),
        (dict(rule="csd", rescale=0.5), "rescale: works with"),
        (dict(grad_clip=(0.0, 1.0)), "greater than 0"),
        (dict(guidance_scale=7.5), "guidance_scale"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GuidanceSettings(**settings)


def test_wrong_image_shape_is_named():
    with pytest.raises(ValueError, match=r"images: wanted shape \[2, \*, \*, 3\], got \[1, 8, 8, 3\]"):
        make()(images(batch=1, side=8), orbit_views([0.0, 90.0]), 0.0)
