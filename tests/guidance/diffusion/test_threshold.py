"""Thresholds on the guided x0_hat: Imagen's static and dynamic ones, by hand and through every rule."""

import pytest
import torch

from stages.cameras import orbit_views
from stages.errors import UserError
from stages.guidance.guidance import GuidanceSettings
from stages.guidance.prior import add_noise, eps_from_x0, x0_from_eps
from stages.guidance.residuals import RULES
from stages.guidance.rules import dynamic_threshold
from tests.guidance.gaussian_prior import EMPTY, NEGATIVE, PROMPT, GaussianPrior, images, make, x0_of_gradient

AT = dict(t_min=0.9, t_max=0.9)  # high noise: guidance throws x0_hat far out here


def test_dynamic_threshold_divides_by_the_quantile_and_leaves_samples_in_range_alone():
    far = torch.tensor([-4.0, -1.0, 0.0, 0.5, 2.0]).reshape(1, 1, 1, 5)
    near = torch.tensor([-1.0, -0.2, 0.0, 0.5, 0.9]).reshape(1, 1, 1, 5)
    got = dynamic_threshold(torch.cat([far, near]), (-1.0, 1.0), 0.75)
    # |far| sorted 0 0.5 1 2 4: its 75 % quantile is 2
    torch.testing.assert_close(got[0].flatten(), torch.tensor([-1.0, -0.5, 0.0, 0.25, 1.0]))
    assert torch.equal(got[1:], near)
    shifted = dynamic_threshold(far * 3 + 5, (2.0, 8.0), 0.75)  # the same in the units of another range
    torch.testing.assert_close(shifted, got[:1] * 3 + 5)


def test_static_threshold_keeps_the_target_of_sds_within_the_data_range():
    free, plain = x0_of_gradient(make(scale=30.0, **AT))
    x0, metrics = x0_of_gradient(make(scale=30.0, threshold="static", **AT))
    outside = (free.abs() > 1).double().mean().item()
    assert free.abs().max() > 5 and outside > 0.3  # what guidance alone asks for
    torch.testing.assert_close(x0, free.clamp(-1, 1), atol=1e-4, rtol=0)
    assert metrics["clamped"] == pytest.approx(outside, abs=1e-3) and "clamped" not in plain


def test_dynamic_threshold_keeps_the_order_that_a_clamp_flattens():
    free, _ = x0_of_gradient(make(scale=30.0, **AT))
    x0, _ = x0_of_gradient(make(scale=30.0, threshold="dynamic", threshold_quantile=1.0, **AT))
    expected = free / free.abs().flatten(1).max(1).values.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x0, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("rule", sorted(set(RULES) - {"vsd"}))  # vsd needs a network: test_guidance_vsd.py
def test_threshold_that_never_binds_changes_no_rule(rule, kind):
    def gradient(**settings):
        picture = images(batch=2)
        guidance = make("bad", rule=rule, scale=7.5, inversion_steps=3, t_min=0.7, t_max=0.7, **settings)
        guidance(picture, orbit_views([0.0, 90.0]), 0.5).loss.backward()
        return picture.grad

    wide = gradient(threshold=kind, threshold_range=(-100.0, 100.0))
    torch.testing.assert_close(wide, gradient(), atol=2e-4, rtol=1e-4)
    assert (gradient(threshold=kind, threshold_range=(-0.1, 0.1)) - wide).abs().max() > 0.05  # it can bind


@pytest.mark.parametrize("rule", ["csd", "nfsd"])
def test_rules_without_added_noise_bound_the_same_guided_prediction(rule):
    """eps_hat = reference + residual; bounding it and taking the reference off again, by hand."""
    guidance = make("bad", rule=rule, scale=7.5, threshold="static", t_min=0.7, t_max=0.7, negative_share=1.0)
    picture = images(batch=2)
    guidance(picture, orbit_views([0.0, 90.0]), 0.5).loss.backward()

    x, alpha_bar = images(batch=2).detach().permute(0, 3, 1, 2) * 2 - 1, guidance.prior.alphas_cumprod[[700, 700]]
    generator = torch.Generator().manual_seed(0)
    torch.rand(2, generator=generator, dtype=torch.float64), torch.randperm(2, generator=generator)
    z = add_noise(x, torch.randn(x.shape, generator=generator), alpha_bar)
    t = torch.tensor([700, 700])
    eps_y, eps_0, eps_n = (
        guidance.prior.predict_noise(z, t, torch.tensor([kind] * 2), [0, 0]) for kind in (PROMPT, EMPTY, NEGATIVE)
    )
    if rule == "csd":  # the negative prompt has faded in
        eps_hat = eps_n + 7.5 * (eps_y - eps_n)
    else:
        eps_hat = eps_0 + 7.5 * (eps_y - eps_0)
    bounded = eps_from_x0(x0_from_eps(eps_hat, z, alpha_bar).clamp(-1, 1), z, alpha_bar)
    torch.testing.assert_close(picture.grad.permute(0, 3, 1, 2) * 2 / 2, bounded - eps_n, atol=1e-4, rtol=1e-4)


def test_threshold_on_latents_of_unknown_range_is_refused_until_a_range_is_given():
    class Latent(GaussianPrior):
        data_range = None

    from stages.guidance.compatibility import data_range

    settings = GuidanceSettings(threshold="static")
    with pytest.raises(UserError, match="threshold=static does not fit the prior gaussian") as error:
        data_range(Latent(), settings)
    assert "threshold_range" in error.value.fix
    with_range = GuidanceSettings(threshold="static", threshold_range=(-3.0, 3.0))
    assert data_range(Latent(), with_range) == (-3.0, 3.0)
    assert data_range(Latent(), GuidanceSettings()) is None


@pytest.mark.parametrize(
    "settings", [dict(threshold_quantile=0.4), dict(threshold_range=(1.0, -1.0)), dict(threshold="clip")]
)
def test_thresholds_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match="threshold"):
        GuidanceSettings(**settings)
