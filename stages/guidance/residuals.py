"""What each rule asks its prior: the glue between noise predictions and the pure functions of rules.py.

A rule is a function (StepInputs, settings) -> Residual, chosen by name from RULES; the gradient on x is w_t * residual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from stages.guidance import rules
from stages.guidance.prior import add_noise, eps_from_x0, per_sample, x0_from_eps
from stages.guidance.schedules import noisier_than_stable_diffusions
from stages.guidance.settings import GuidanceSettings
from stages.prompts import ViewPrompts


class Residual(NamedTuple):
    """residual: what the step pushes against. eps_hat: the guided (and bounded) prediction that it comes from, whose
    x0_hat is where the rule wants to go. eps_y: the prediction under the prompt alone, not pushed by Perp-Neg. z_t: the
    point of both."""

    residual: Tensor
    eps_hat: Tensor
    eps_y: Tensor
    z_t: Tensor


@dataclass
class StepInputs:
    """One step as a rule sees it; `predict(z, t, *branches)` evaluates branches prompt / negative / empty at once,
    each distinct text once.

    data_range: what x0_hat is brought back to, None for no threshold. backdrop: what x was composited on, in its space,
    where x0_hat is to be put on it. against: Perp-Neg's weights [B] of the branches
    "against 0", ...; empty without it. score: eps_phi(z, t) of the present renders, for vsd. metrics: what the rule
    has to report.
    """

    x: Tensor
    eps: Tensor
    t: Tensor
    alphas_cumprod: Tensor
    progress: float
    predict: Callable[..., list[Tensor]]
    data_range: tuple[float, float] | None = None
    backdrop: Tensor | None = None
    against: list[Tensor] = field(default_factory=list)
    score: Callable[[Tensor, Tensor], Tensor] | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def bounds(self) -> bool:
        """Whether `bounded` does anything."""
        return self.data_range is not None or self.backdrop is not None

    def noisy(self, eps: Tensor) -> Tensor:
        return add_noise(self.x, eps, self.alphas_cumprod[self.t])

    def guided(self, z: Tensor, t: Tensor, settings: GuidanceSettings) -> tuple[Tensor, Tensor]:
        """(eps_hat under classifier-free guidance, rescale and threshold, eps_y); one prediction only where s = 1."""
        if settings.scale == 1:
            (eps_y,) = self.predict(z, t, "prompt")
            return self.bounded(eps_y, z, t, settings), eps_y
        eps_y, pushed, eps_0 = self.asked(z, t, "negative")
        eps_hat = rules.guided(pushed, eps_0, settings.scale)
        eps_hat = rules.rescaled(eps_hat, eps_y, z, self.alphas_cumprod[t], settings.rescale)
        return self.bounded(eps_hat, z, t, settings), eps_y

    def asked(self, z: Tensor, t: Tensor, *references: str) -> list[Tensor]:
        """[eps_y, pushed, *references]: the prompt's prediction, the same pushed by Perp-Neg, seen from the first
        reference, where views ask for that, and the references' own."""
        names = [f"against {k}" for k in range(len(self.against))]
        eps_y, *rest = self.predict(z, t, "prompt", *references, *names)
        found, others = rest[: len(references)], rest[len(references) :]
        return [eps_y, rules.perp_neg(eps_y, found[0], others, self.against) if others else eps_y, *found]

    def bounded(self, eps_hat: Tensor, z: Tensor, t: Tensor, settings: GuidanceSettings) -> Tensor:
        """eps_hat with its x0_hat brought back to the data range and put on the true backdrop, as the settings say."""
        if not self.bounds:
            return eps_hat
        alpha_bar = self.alphas_cumprod[t]
        x0 = x0_from_eps(eps_hat, z, alpha_bar)
        if self.data_range is not None:
            low, high = self.data_range
            self.metrics["clamped"] = float(((x0 < low) | (x0 > high)).double().mean())
            if settings.threshold == "static":
                x0 = x0.clamp(low, high)
            else:
                x0 = rules.dynamic_threshold(x0, self.data_range, settings.threshold_quantile)
        if self.backdrop is not None:
            x0 = rules.on_backdrop(x0, self.backdrop, settings.backdrop)
        return eps_from_x0(x0, z, alpha_bar)

    def invert(self, t_end: Tensor, steps: int, scale: float) -> Tensor:
        """DDIM inversion of x up to timesteps t_end [B] in `steps` equal moves; scale 0 uses the empty prompt alone."""
        z, t = self.x, torch.zeros_like(t_end)
        alpha_bar = torch.ones(t_end.shape[0])  # x itself is clean
        for k in range(1, steps + 1):
            if scale == 0:
                (eps,) = self.predict(z, t, "empty")
            else:
                eps_y, eps_0 = self.predict(z, t, "prompt", "empty")
                eps = rules.guided(eps_y, eps_0, scale)
            t = (t_end * k) // steps
            z = rules.ddim_step(z, eps, alpha_bar, self.alphas_cumprod[t])
            alpha_bar = self.alphas_cumprod[t]
        return z


Rule = Callable[[StepInputs, GuidanceSettings], Residual]


def _sds(p: StepInputs, s: GuidanceSettings) -> Residual:
    z_t = p.noisy(p.eps)
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return Residual(rules.sds(eps_hat, p.eps), eps_hat, eps_y, z_t)


def _sjc(p: StepInputs, s: GuidanceSettings) -> Residual:
    z_t = p.noisy(p.eps)
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return Residual(rules.sjc(eps_hat), eps_hat, eps_y, z_t)


def _csd(p: StepInputs, s: GuidanceSettings) -> Residual:
    """Its residual is eps_hat - reference with eps_hat = reference + s (eps_y - reference), bounded by a threshold."""
    z_t = p.noisy(p.eps)
    negative = s.csd_negative.at(p.progress)
    if negative == 0:
        eps_y, pushed, reference = p.asked(z_t, p.t, "empty")
        residual = rules.csd(pushed, reference)
    elif negative == 1 and not p.against:  # Perp-Neg is measured from the empty prompt
        eps_y, pushed, reference = p.asked(z_t, p.t, "negative")
        residual = rules.csd(pushed, reference)
    else:
        eps_y, pushed, eps_0, eps_n = p.asked(z_t, p.t, "empty", "negative")
        reference = eps_0 + negative * (eps_n - eps_0)
        residual = rules.csd(pushed, eps_0, eps_n, negative)
    return _measured_from(reference, s.scale * residual, eps_y, z_t, p, s)


def _nfsd(p: StepInputs, s: GuidanceSettings) -> Residual:
    """Its residual is eps_hat at low noise and eps_hat - eps_n above, eps_hat = eps_0 + s (eps_y - eps_0)."""
    z_t = p.noisy(p.eps)
    eps_y, pushed, eps_0, eps_n = p.asked(z_t, p.t, "empty", "negative")
    low_noise = ~noisier_than_stable_diffusions(0.2, p.alphas_cumprod[p.t])
    residual = rules.nfsd(pushed, eps_0, eps_n, s.scale, low_noise)
    reference = torch.where(per_sample(low_noise, eps_n).bool(), torch.zeros_like(eps_n), eps_n)
    return _measured_from(reference, residual, eps_y, z_t, p, s)


def _measured_from(
    reference: Tensor, residual: Tensor, eps_y: Tensor, z_t: Tensor, p: StepInputs, s: GuidanceSettings
) -> Residual:
    """A residual eps_hat - reference with its eps_hat bounded."""
    eps_hat = reference + residual
    if p.bounds:
        eps_hat = p.bounded(eps_hat, z_t, p.t, s)
        residual = eps_hat - reference
    return Residual(residual, eps_hat, eps_y, z_t)


def _ism(p: StepInputs, s: GuidanceSettings) -> Residual:
    delta = round(s.ism_delta.at(p.progress) * p.alphas_cumprod.shape[0])
    t_s = (p.t - max(delta, 1)).clamp_min(0)
    z_s = p.invert(t_s, s.inversion_steps, scale=0)
    (eps_s,) = p.predict(z_s, t_s, "empty")
    z_t = rules.ddim_step(z_s, eps_s, p.alphas_cumprod[t_s], p.alphas_cumprod[p.t])
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return Residual(rules.ism(eps_hat, eps_s), eps_hat, eps_y, z_t)


def _sdi(p: StepInputs, s: GuidanceSettings) -> Residual:
    """SDS whose noise is the one that DDIM inversion finds in x (arXiv 2405.15891 alg. 1) in place of a random one."""
    z_t = p.invert(p.t, s.inversion_steps, scale=s.inversion_scale)
    alpha_bar = p.alphas_cumprod[p.t]
    eps = (z_t - per_sample(alpha_bar.sqrt(), z_t) * p.x) / per_sample((1 - alpha_bar).sqrt(), z_t)
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return Residual(rules.sds(eps_hat, eps), eps_hat, eps_y, z_t)


def _vsd(p: StepInputs, s: GuidanceSettings) -> Residual:
    z_t = p.noisy(p.eps)
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return Residual(rules.vsd(eps_hat, p.score(z_t, p.t)), eps_hat, eps_y, z_t)


RULES: dict[str, Rule] = {
    "sds": _sds,
    "sjc": _sjc,
    "csd": _csd,
    "nfsd": _nfsd,
    "ism": _ism,
    "sdi": _sdi,
    "vsd": _vsd,
}


def most_predictions(settings: GuidanceSettings, prompts: ViewPrompts) -> int:
    """Most predictions a view that a rule asks for in one batch: prompt, references, and two of Perp-Neg."""
    if settings.rule in ("csd", "nfsd"):
        own = 3 if any(prompts.negatives()) else 2  # without one the negative and the empty prompt are the same
    else:
        own = 1 if settings.scale == 1 and settings.rule != "sdi" else 2  # sdi's inversion has a scale of its own
    return own + (2 if prompts.settings.blend == "perp_neg" else 0)
