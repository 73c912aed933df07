"""Rules where the answer is known: the exact reference prior, data of two pictures, guidance's bias and its cures."""

import math

import numpy as np
import pytest
import torch

from stages.cameras import orbit_views
from stages.guidance.exact import ReferencePrior, ReferenceSettings, mixture_noise
from stages.guidance.guidance import Guidance, GuidanceSettings
from stages.guidance.prior import ViewContext, scaled_linear_alphas_cumprod
from stages.prompts import ViewPrompts
from tests.guidance.gaussian_prior import EMPTY, PROMPT, GaussianPrior, images, k_of, make, mean_gradient, with_rule
from tests.toy_pipeline import octahedron

T = 400
ALPHA_BAR = scaled_linear_alphas_cumprod()[T].item()
A, SIGMA = math.sqrt(ALPHA_BAR), math.sqrt(1 - ALPHA_BAR)
SIMPLE = dict(scale=1.0, weighting="uniform", t_min=T / 1000, t_max=T / 1000, srgb=False)


STD = 0.4


@pytest.fixture(scope="module")
def reference():
    return ReferencePrior(octahedron(), ReferenceSettings(resolution=16, std=STD))


def slope(prior, **settings):
    """(b, rest): the mean gradient on x, read as b (x - y) with y the prior's own picture, and what b leaves over."""
    guidance = Guidance(
        prior, GuidanceSettings(**with_rule(SIMPLE | settings)), ViewPrompts("a mesh"), torch.Generator().manual_seed(2)
    )
    views = orbit_views(torch.full((32,), 30.0), 20.0)
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(1, 16, 16, 3, generator=generator)
    picture = one.expand(32, -1, -1, -1).clone().requires_grad_()
    guidance(picture, views, 0.5, backdrop=torch.full((32, 16, 16, 3), 0.5)).loss.backward()
    gradient = (picture.grad * 32 / 2).double()
    y = prior.image_set(ViewContext(views[0], torch.full((1, 16, 16, 3), 0.5)))[0, 0].permute(1, 2, 0)
    away = ((one[0] * 2 - 1) - y).double()
    b = (gradient.mean(0) * away).sum() / away.square().sum()
    return b.item(), (gradient.mean(0) - b * away).square().mean().sqrt().item()


def flow(alpha_bar):
    """The width of N(y, STD^2) at a noise level; its flow keeps (z - a y) / width (Song et al. 2021)."""
    return math.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)


def test_gradient_of_sds_and_sjc_on_the_reference_prior_is_its_formula(reference):
    k = A * SIGMA / flow(ALPHA_BAR) ** 2
    for rule in ("sds", "sjc"):
        b, rest = slope(reference, rule=rule)
        assert b == pytest.approx(k, abs=0.02) and rest < 0.25  # noise of 32 views: about 1 / sqrt(32)
    assert slope(reference, rule="sds", weighting="sds")[0] == pytest.approx((1 - ALPHA_BAR) * k, abs=0.02)


def test_gradient_of_sdi_on_the_reference_prior_is_its_formula_without_noise(reference):
    # inverted: z_t = a y + width / STD (x - y); its noise and the predicted one, both linear in x - y
    width = flow(ALPHA_BAR)
    z_over = width / STD
    expected = SIGMA / width**2 * z_over - (z_over - A) / SIGMA
    b, rest = slope(reference, rule="sdi", inversion_scale=1.0, inversion_steps=50)
    assert b == pytest.approx(expected, rel=0.03) and rest < 1e-3
    assert abs(expected) > 0.05


def test_gradient_of_ism_on_the_reference_prior_is_its_formula_without_noise(reference):
    s = scaled_linear_alphas_cumprod()[T - 100].item()
    z_s = flow(s) / STD
    eps_s = math.sqrt(1 - s) / flow(s) ** 2 * z_s
    z_t = A * (z_s - math.sqrt(1 - s) * eps_s) / math.sqrt(s) + SIGMA * eps_s
    expected = SIGMA / flow(ALPHA_BAR) ** 2 * z_t - eps_s
    b, rest = slope(reference, rule="ism", delta=0.1, inversion_steps=50)
    assert b == pytest.approx(expected, rel=0.05) and rest < 1e-3
    assert abs(expected) > 0.02


class TwoPictures(GaussianPrior):
    """Data are y and -y with equal odds, blurred by 0.6: the posterior mean is y tanh(a <z, y> / v)."""

    level, std, data_range = 0.05, 0.6, (-1.0, 1.0)

    def predict_noise(self, z_t, t, embedding, context):
        y = torch.full((len(z_t), 1, *z_t.shape[1:]), self.level)
        return mixture_noise(z_t, torch.cat([y, -y], 1), self.alphas_cumprod[t], self.std)


@pytest.mark.parametrize("x", [0.0, 0.02, 0.05, 0.3])
def test_monte_carlo_gradient_of_sds_between_two_pictures_is_its_integral(x):
    guidance = Guidance(
        TwoPictures(), GuidanceSettings(**SIMPLE), ViewPrompts("a mug"), torch.Generator().manual_seed(0)
    )
    got = mean_gradient(guidance, x)
    y, n, v = TwoPictures.level, 768, ALPHA_BAR * TwoPictures.std**2 + 1 - ALPHA_BAR
    # <z, y> = a x y n + sigma |y| g with g ~ N(0, 1), |y|^2 = y^2 n
    g = np.linspace(-8, 8, 4001)
    density = np.exp(-(g**2) / 2) / math.sqrt(2 * math.pi)
    tanh = np.tanh(A * (A * x * y * n + SIGMA * y * math.sqrt(n) * g) / v)
    pull = float((tanh * density).sum() * (g[1] - g[0]))
    expected = A * SIGMA / v * (x - y * pull)
    assert got == pytest.approx(expected, abs=5 / math.sqrt(64 * 768))


def clamped_mean(mean, std, low=-1.0, high=1.0):
    """E[clamp(N(mean, std^2), low, high)]."""

    def cdf(u):
        return 0.5 * (1 + math.erf(u / math.sqrt(2)))

    def pdf(u):
        return math.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)

    a, b = (low - mean) / std, (high - mean) / std
    return low * cdf(a) + high * (1 - cdf(b)) + mean * (cdf(b) - cdf(a)) - std * (pdf(b) - pdf(a))


def x0_of_guidance(x, scale, kinds=(PROMPT, EMPTY)):
    """Mean and width of the guided x0_hat at x: eps_hat = p z + c is linear in z on Gaussian data."""
    kappa = [SIGMA / (ALPHA_BAR * std**2 + 1 - ALPHA_BAR) for _, std in kinds]
    parts = [scale, 1 - scale]
    p = sum(w * k for w, k in zip(parts, kappa, strict=True))
    c = -sum(w * k * A * mean for w, k, (mean, _) in zip(parts, kappa, kinds, strict=True))
    return ((1 - SIGMA * p) * A * x - SIGMA * c) / A, abs(1 - SIGMA * p) * SIGMA / A


@pytest.mark.parametrize("x", [-0.6, 0.2, 1.0])
def test_monte_carlo_gradient_under_a_static_threshold_is_its_formula(x):
    mean, std = x0_of_guidance(x, 12.0)
    expected = A / SIGMA * (x - clamped_mean(mean, std))
    guidance = make(scale=12.0, threshold="static", t_min=0.4, t_max=0.4)
    assert mean_gradient(guidance, x) == pytest.approx(expected, abs=0.02)
    assert abs(A / SIGMA * (x - mean) - expected) > 0.3  # without it the step would be another


def test_fixed_point_of_guided_sds_leaves_the_data_range_and_a_static_threshold_keeps_it_in():
    def root(gradient):
        low, high = -3.0, 5.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if gradient(middle) > 0 else (middle, high)
        return low

    scale = 4.0
    k1, k0 = (k_of(torch.tensor(ALPHA_BAR), std).item() for _, std in (PROMPT, EMPTY))
    free = root(lambda x: scale * k1 * (x - PROMPT[0]) + (1 - scale) * k0 * (x - EMPTY[0]))
    mean_clamped = root(lambda x: x - clamped_mean(*x0_of_guidance(x, scale)))
    assert free > 1.2 and PROMPT[0] < mean_clamped < 1
    for expected, settings in ((free, {}), (mean_clamped, {"threshold": "static"})):
        guidance = make(scale=scale, t_min=0.4, t_max=0.4, **settings)
        assert abs(mean_gradient(guidance, expected)) < 0.03
        guidance = make(scale=scale, t_min=0.4, t_max=0.4, **settings)
        assert mean_gradient(guidance, expected - 0.2) < -0.05  # and it is stable


def test_csd_between_equally_wide_prompts_never_stops_and_a_static_threshold_bounds_its_push():
    """CSD compares two predictions and never x itself: with equal widths its push is the same wherever x is."""

    class Equal(GaussianPrior):
        def embed(self, prompts):
            return torch.tensor([[PROMPT[0] if prompt else EMPTY[0], 0.3] for prompt in prompts])

    def gradient(x, **settings):
        guidance_settings = GuidanceSettings(**SIMPLE | dict(rule="csd") | settings)
        prior, prompts = Equal(), ViewPrompts("a mug")
        return mean_gradient(Guidance(prior, guidance_settings, prompts, torch.Generator().manual_seed(0)), x)

    k = k_of(torch.tensor(ALPHA_BAR), 0.3).item()
    for x in (-1.0, 0.5, 3.0):
        for scale in (5.0, 50.0):
            drift = -scale * k * (PROMPT[0] - EMPTY[0])
            assert gradient(x, scale=scale) == pytest.approx(drift, rel=1e-3)  # however bright, brighter still
    x0_empty, _ = x0_of_guidance(0.5, 1.0, ((EMPTY[0], 0.3), (EMPTY[0], 0.3)))
    assert gradient(0.5, scale=50.0, threshold="static") == pytest.approx(-A / SIGMA * (1 - x0_empty), abs=0.02)


def test_image_term_in_pixel_space_is_sds_again():
    def gradient(**settings):
        picture = images(batch=4, side=8)
        guidance = make(scale=3.0, t_min=0.4, t_max=0.4, **settings)
        guidance(picture, orbit_views(torch.arange(4) * 90.0), 0.0).loss.backward()
        return picture.grad

    torch.testing.assert_close(gradient(image_term=0.5), 1.5 * gradient(), rtol=1e-4, atol=1e-5)
    weighted = gradient(image_term=0.5, weighting="sds")
    torch.testing.assert_close(weighted, (1 - ALPHA_BAR) * gradient(image_term=0.5), rtol=1e-4, atol=1e-5)


def test_image_term_reaches_the_render_around_the_encoder():
    class Blind(GaussianPrior):
        """An encoder that sees nothing: all of the gradient is the image term's."""

        def encode(self, images, generator):
            return 0 * super().encode(images, generator)

    settings = GuidanceSettings(**SIMPLE, image_term=0.1)
    guidance = Guidance(Blind(), settings, ViewPrompts("a mug"), torch.Generator().manual_seed(0))
    picture = images(0.7, batch=64, side=8)
    guidance(picture, orbit_views(torch.arange(64) * 5.0), 0.0).loss.backward()
    # x = 0, so x0_hat's mean is 0 - sigma / a k (0 - m), and the term pulls the render of 0.7 towards it
    x0 = SIGMA / A * k_of(torch.tensor(ALPHA_BAR), PROMPT[1]).item() * PROMPT[0]
    got = picture.grad.mean().item() * 64 / 2
    assert got == pytest.approx(0.1 * A / SIGMA * (0.7 - x0), abs=0.01)


def test_highest_t_may_jump_at_a_share():
    guidance = make(t_min=0.02, t_max=(0.98, 0.4, 0.5, 0.5))
    views = orbit_views(torch.arange(32) * 10.0)
    tops = [guidance(images(batch=32, side=2), views, p).metrics["t_max"] for p in (0.0, 0.49, 0.5, 1.0)]
    assert tops == [0.98, 0.98, 0.4, 0.4]
    assert guidance(images(batch=32, side=2), views, 0.9).metrics["t"] < 0.25


def test_gradient_clamp_widens_between_its_shares_and_says_how_much_it_held():
    guidance = make(scale=7.5, grad_clip=(0.5, 20.0, 0.2, 0.4), t_min=0.4, t_max=0.4)
    points = {}
    for progress, limit in ((0.0, 0.5), (0.3, 10.25), (0.9, 20.0)):
        picture = images(batch=2)
        output = guidance(picture, orbit_views([0.0, 90.0]), progress)
        output.loss.backward()
        points[progress] = output.metrics["clipped"]
        assert picture.grad.abs().max().item() <= limit * (1 + 1e-6)
    assert points[0.0] > 0.2 > points[0.9] == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(t_max=(0.98, 1.4, 0.5, 0.5)), "t_max"),
        (dict(t_max=(0.98, 0.01, 0.5, 0.5)), "at 0.5 of the stage the range is .0.02, 0.01., low above high"),
        (dict(grad_clip=(0.5, 2.0, 0.6, 0.2)), "0 <= from <= until <= 1"),
        (dict(rule={"name": "vsd", "rank": 0}), "rank"),
    ],
)
def test_settings_of_rules_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GuidanceSettings(**settings)
