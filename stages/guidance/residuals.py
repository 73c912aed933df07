"""The distillation rules as a table: what each asks its prior, which settings are its own, and what it needs.

A rule is an entry of RULES. Its residual is a function (StepInputs, settings) -> Residual, the glue between noise
predictions and the pure functions of rules.py; the gradient on x is w_t * residual. Its own settings are settings.rule.
Whoever has to know something about a rule asks its entry, so a new one is written in this module alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo
from torch import Tensor

from stages.guidance import rules
from stages.guidance.prior import add_noise, eps_from_x0, per_sample, x0_from_eps
from stages.guidance.schedules import noisier_than_stable_diffusions
from stages.guidance.vsd import VsdSettings
from stages.prompts import ViewPrompts
from stages.ramp import Ramp

Need = Literal["words", "invertible", "trainable", "negative"]


class RuleSettings(BaseModel):
    """A rule by its name; those of a rule with settings of its own extend it."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    name: str = Field("sds", description="distillation rule")

    @classmethod
    def variants(cls) -> dict[str, type[BaseModel]]:
        """Return the settings of every rule by its name."""
        return {name: rule.settings for name, rule in RULES.items()}


class CsdSettings(RuleSettings):
    """Classifier score distillation."""

    negative_share: Ramp = Field(
        Ramp(0.0, 1.0, 0.0, 0.5), ge=0, le=1, description="share of the negative prompt in the reference, else empty"
    )


class IsmSettings(RuleSettings):
    """Interval score matching."""

    delta: Ramp = Field(Ramp(0.1, 0.025), gt=0, le=1, description="t - s as a fraction of the schedule")
    inversion_steps: int = Field(5, ge=1, le=50, description="DDIM inversion steps from clean to noisy")


class SdiSettings(RuleSettings):
    """Score distillation via inversion."""

    inversion_steps: int = Field(5, ge=1, le=50, description="DDIM inversion steps from clean to noisy")
    inversion_scale: float = Field(-7.5, description="guidance scale s of the inversion")


class VsdRuleSettings(VsdSettings, RuleSettings):
    """Variational score distillation."""


class SharedSettings(Protocol):
    """What a rule reads of a stage's guidance settings (stages/guidance/settings.py) beside its own."""

    scale: float
    rescale: float
    threshold: str
    threshold_quantile: float
    backdrop_width: float | None
    rule: Any


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

    def guided(self, z: Tensor, t: Tensor, settings: SharedSettings) -> tuple[Tensor, Tensor]:
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
        predictions, others = rest[: len(references)], rest[len(references) :]
        return [eps_y, rules.perp_neg(eps_y, predictions[0], others, self.against) if others else eps_y, *predictions]

    def bounded(self, eps_hat: Tensor, z: Tensor, t: Tensor, settings: SharedSettings) -> Tensor:
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
            x0 = rules.on_backdrop(x0, self.backdrop, settings.backdrop_width)
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


def _sds(p: StepInputs, s: SharedSettings) -> Residual:
    z_t = p.noisy(p.eps)
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return Residual(rules.sds(eps_hat, p.eps), eps_hat, eps_y, z_t)


def _sjc(p: StepInputs, s: SharedSettings) -> Residual:
    z_t = p.noisy(p.eps)
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return Residual(rules.sjc(eps_hat), eps_hat, eps_y, z_t)


def _csd(p: StepInputs, s: SharedSettings) -> Residual:
    """Its residual is eps_hat - reference with eps_hat = reference + s (eps_y - reference), bounded by a threshold."""
    z_t = p.noisy(p.eps)
    negative = s.rule.negative_share.at(p.progress)
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


def _nfsd(p: StepInputs, s: SharedSettings) -> Residual:
    """Its residual is eps_hat at low noise and eps_hat - eps_n above, eps_hat = eps_0 + s (eps_y - eps_0)."""
    z_t = p.noisy(p.eps)
    eps_y, pushed, eps_0, eps_n = p.asked(z_t, p.t, "empty", "negative")
    low_noise = ~noisier_than_stable_diffusions(0.2, p.alphas_cumprod[p.t])
    residual = rules.nfsd(pushed, eps_0, eps_n, s.scale, low_noise)
    reference = torch.where(per_sample(low_noise, eps_n).bool(), torch.zeros_like(eps_n), eps_n)
    return _measured_from(reference, residual, eps_y, z_t, p, s)


def _measured_from(
    reference: Tensor, residual: Tensor, eps_y: Tensor, z_t: Tensor, p: StepInputs, s: SharedSettings
) -> Residual:
    """A residual eps_hat - reference with its eps_hat bounded."""
    eps_hat = reference + residual
    if p.bounds:
        eps_hat = p.bounded(eps_hat, z_t, p.t, s)
        residual = eps_hat - reference
    return Residual(residual, eps_hat, eps_y, z_t)


def _ism(p: StepInputs, s: SharedSettings) -> Residual:
    delta = round(s.rule.delta.at(p.progress) * p.alphas_cumprod.shape[0])
    t_s = (p.t - max(delta, 1)).clamp_min(0)
    z_s = p.invert(t_s, s.rule.inversion_steps, scale=0)
    (eps_s,) = p.predict(z_s, t_s, "empty")
    z_t = rules.ddim_step(z_s, eps_s, p.alphas_cumprod[t_s], p.alphas_cumprod[p.t])
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return Residual(rules.ism(eps_hat, eps_s), eps_hat, eps_y, z_t)


def _sdi(p: StepInputs, s: SharedSettings) -> Residual:
    """SDS whose noise is the one that DDIM inversion finds in x (arXiv 2405.15891 alg. 1) in place of a random one."""
    z_t = p.invert(p.t, s.rule.inversion_steps, scale=s.rule.inversion_scale)
    alpha_bar = p.alphas_cumprod[p.t]
    eps = (z_t - per_sample(alpha_bar.sqrt(), z_t) * p.x) / per_sample((1 - alpha_bar).sqrt(), z_t)
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return Residual(rules.sds(eps_hat, eps), eps_hat, eps_y, z_t)


def _vsd(p: StepInputs, s: SharedSettings) -> Residual:
    z_t = p.noisy(p.eps)
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return Residual(rules.vsd(eps_hat, p.score(z_t, p.t)), eps_hat, eps_y, z_t)


def _guided_predictions(s: SharedSettings, prompts: ViewPrompts) -> int:
    return 1 if s.scale == 1 else 2


def _predictions_with_negative(s: SharedSettings, prompts: ViewPrompts) -> int:
    return 3 if any(prompts.negatives()) else 2  # without one the negative and the empty prompt are the same


@dataclass(frozen=True)
class Rule:
    """What there is to know about a rule.

    Args:
        residual: what a step pushes against, from (StepInputs, settings).
        settings: its own settings.
        needs: "words", a prior that reads prompts; "invertible", one whose noise can be read off a clean image;
            "trainable", one whose network can learn the score of the renders (vsd.py); "negative", a negative prompt.
        predictions: the most that it asks for in one batch a view, without Perp-Neg's.
        contrast: it compares predictions in place of guiding one: it has a term of its own for the negative prompt,
            and no whole x0_hat that a rescale is defined on.
        stateful: it has a state that a checkpoint holds.
        shaping: those of its settings that the state's shape follows.
    """

    residual: Callable[[StepInputs, SharedSettings], Residual]
    settings: type[RuleSettings] = RuleSettings
    needs: frozenset[Need] = frozenset()
    predictions: Callable[[SharedSettings, ViewPrompts], int] = _guided_predictions
    contrast: bool = False
    stateful: bool = False
    shaping: tuple[str, ...] = ()


_CONTRAST: dict[str, Any] = {"predictions": _predictions_with_negative, "contrast": True}
RULES: dict[str, Rule] = {
    "sds": Rule(_sds),
    "sjc": Rule(_sjc),
    "csd": Rule(_csd, CsdSettings, frozenset({"words"}), **_CONTRAST),
    "nfsd": Rule(_nfsd, needs=frozenset({"words", "negative"}), **_CONTRAST),
    "ism": Rule(_ism, IsmSettings, frozenset({"invertible"})),
    "sdi": Rule(_sdi, SdiSettings, frozenset({"invertible"}), lambda s, prompts: 2),  # the inversion's scale is its own
    "vsd": Rule(_vsd, VsdRuleSettings, frozenset({"trainable"}), stateful=True, shaping=("model", "rank")),
}


def read_rule(value: Any, info: ValidationInfo) -> RuleSettings:
    """Return the settings of a rule from its name, or from a mapping of its name and what it sets.

    Raises: ValueError for a name that is not in RULES, and for settings that the rule does not have.
    """
    if isinstance(value, RuleSettings):
        value = value.model_dump()
    values = {"name": value} if isinstance(value, str) else value
    names = ", ".join(RULES)
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise ValueError(f"wanted the name of a rule, or a mapping with its name: {names}")
    if values["name"] not in RULES:
        raise ValueError(f"the rules are {names}, got {values['name']!r}")
    kind = RULES[values["name"]].settings
    if info.mode == "json":
        return kind.model_validate_json(json.dumps(values), strict=True)
    return kind.model_validate(values)


def most_predictions(settings: SharedSettings, prompts: ViewPrompts) -> int:
    """Return the most predictions a view that a rule asks for in one batch: its own, and two of Perp-Neg."""
    of_rule = RULES[settings.rule.name].predictions(settings, prompts)
    return of_rule + (2 if prompts.settings.blend == "perp_neg" else 0)
