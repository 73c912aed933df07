"""A prior whose data are Gaussian, so that every rule's expected gradient is known by hand.

The prior knows, for each prompt, the data distribution N(mean, std^2 I). Its noise prediction is
    eps(z_t) = sigma / v (z_t - alpha mean),  v = alpha^2 std^2 + sigma^2,  so  E[eps(z_t) | x] = k (x - mean)
with k = alpha sigma / v.
"""

import torch

from stages.cameras import orbit_views
from stages.guidance.guidance import Guidance, GuidanceSettings
from stages.guidance.prior import per_sample, scaled_linear_alphas_cumprod
from stages.guidance.residuals import RULES
from stages.prompts import ViewPrompts

X0, PROMPT, EMPTY, NEGATIVE = 0.2, (0.5, 0.3), (-0.1, 0.6), (0.9, 0.4)
VIEWS = 64


class GaussianPrior:
    """The exact denoiser of N(mean, std^2 I), mean and std by prompt; counts the samples of each call."""

    name, resolution, alphas_cumprod = "gaussian", 8, scaled_linear_alphas_cumprod()
    data_range, prediction = (-1.0, 1.0), "epsilon"
    reads_prompts, reads_t_anywhere = True, False

    def __init__(self):
        self.calls = []

    def embed(self, prompts):
        kinds = {"": EMPTY, "bad": NEGATIVE}
        return torch.tensor([kinds.get(prompt, PROMPT) for prompt in prompts])

    def encode(self, images, generator):
        return images.permute(0, 3, 1, 2) * 2 - 1

    def decode(self, x):
        return (x.permute(0, 2, 3, 1) + 1) / 2

    def predict_noise(self, z_t, t, embedding, context):
        assert len(z_t) == len(t) == len(embedding) == len(context)
        self.calls.append(len(z_t))
        mean, std = (per_sample(column, z_t) for column in embedding.unbind(-1))
        alpha_bar = per_sample(self.alphas_cumprod[t], z_t)
        v = alpha_bar * std**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() / v * (z_t - alpha_bar.sqrt() * mean)


def k_of(alpha_bar, std):
    """k in E[eps(z_t) | x] = k (x - mean)."""
    return (alpha_bar * (1 - alpha_bar)).sqrt() / (alpha_bar * std**2 + 1 - alpha_bar)


OWN = {key for rule in RULES.values() for key in rule.settings.model_fields} - {"name", "lr"}


def with_rule(settings):
    """Settings whose rule is a name, with those that are the rule's own put beside it; what it has not is left out."""
    name = settings.get("rule", "sds")
    if isinstance(name, dict):
        return settings
    known = RULES[name].settings.model_fields if name in RULES else {}
    of_rule = {key: value for key, value in settings.items() if key in OWN and key in known}
    return {key: value for key, value in settings.items() if key not in OWN} | {"rule": {"name": name, **of_rule}}


def make(negative="", seed=0, **settings):
    """Guidance under the Gaussian prior, with weight 1 and no change of colour unless asked for."""
    settings = {"t_max": 0.98, "weighting": "uniform", "srgb": False} | settings
    guidance_settings = GuidanceSettings(**with_rule(settings))
    return Guidance(
        GaussianPrior(), guidance_settings, ViewPrompts("a mug", negative), torch.Generator().manual_seed(seed)
    )


def images(value=X0, batch=VIEWS, side=16):
    """Pictures whose x is `value` everywhere."""
    return torch.full((batch, side, side, 3), (value + 1) / 2).requires_grad_()


def mean_gradient(guidance, x=X0, progress=0.0):
    """Mean over views, pixels and noise of the gradient on x (the images hold x at half scale)."""
    picture = images(x)
    guidance(picture, orbit_views(torch.arange(VIEWS) * 5.0, 10.0), progress).loss.backward()
    return picture.grad.mean().item() * VIEWS / 2  # d x / d image = 2; the loss averages over views


def x0_of_gradient(guidance, t=900, **context):
    """The x0_hat that a step pushes towards: with weight 1 the residual is eps(x0_hat) - eps."""
    picture = images(batch=4)
    output = guidance(picture, orbit_views(torch.arange(4) * 90.0), 0.0, **context)
    output.loss.backward()
    residual = picture.grad.permute(0, 3, 1, 2) * 4 / 2
    alpha_bar = guidance.prior.alphas_cumprod[[t] * 4]
    x = images(batch=4).detach().permute(0, 3, 1, 2) * 2 - 1
    a, s = alpha_bar[0].sqrt(), (1 - alpha_bar[0]).sqrt()
    return x - s / a * residual, output.metrics  # SDS in x0 form: residual = a / s (x - x0_hat)
