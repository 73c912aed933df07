"""The table of distillation rules: the residual, the settings and the needs of each.

A rule is an entry of RULES. Its residual is a function (StepInputs, settings) -> Residual, the glue between noise
predictions and the pure functions of rules.py; the gradient on x is w_t * residual. Its own settings are settings.rule.
All other modules ask the entry about a rule, so a new rule is written in this module alone.
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
from stages.guidance.guide import Metric, metric
from stages.guidance.prior import add_noise, eps_from_x0, per_sample, x0_from_eps
from stages.guidance.schedules import at_or_above_sd_noise
from stages.guidance.vsd import VsdSettings
from stages.prompts import ViewPrompts
from stages.ramp import Ramp

Need = Literal["words", "invertible", "trainable", "negative"]


class RuleSettings(BaseModel):
    """The name of a rule; a rule with settings of its own extends it."""

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
    """The settings of guidance (stages/guidance/settings.py) that a rule reads beside its own."""

    scale: float
    rescale: float
    threshold: str
    threshold_quantile: float
    backdrop_width: float | None
    rule: Any


class Residual(NamedTuple):
    """The result of a rule for a step; all [B, C, h, w].

    Args:
        residual: the gradient on x is w_t times this.
        eps_hat: the guided prediction behind the residual; its x0_hat, corrected, is where the rule pulls to.
        eps_y: the prediction under the prompt alone, without Perp-Neg.
        z_t: the noisy data of both predictions.
    """

    residual: Tensor
    eps_hat: Tensor
    eps_y: Tensor
    z_t: Tensor


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a rule for one step.

    Args:
        x: clean renders in the prior's space [B, C, h, w], without gradient.
        eps: unit noise like x.
        t: timesteps [B].
        alphas_cumprod: the prior's schedule [T].
        progress: share of the stage done, in [0, 1].
        predict: (z, t, *branches) -> a noise prediction like z for each branch, which is "prompt", "negative", "empty"
            or, under Perp-Neg, "perp_neg 0", "perp_neg 1"; equal texts are evaluated once.
        data_range: what x0_hat is clamped to; None for no threshold.
        backdrop: what x was composited on, in the prior's space, to replace that of x0_hat; None leaves x0_hat's.
        perp_neg_weights: Perp-Neg's weights [B] <= 0 of the branches "perp_neg 0", ...; empty without it.
        score: (z, t) -> eps_phi of the present renders, for vsd.
        metrics: what the rule reports, by name; filled by the rule.
    """

    x: Tensor
    eps: Tensor
    t: Tensor
    alphas_cumprod: Tensor
    progress: float
    predict: Callable[..., list[Tensor]]
    data_range: tuple[float, float] | None = None
    backdrop: Tensor | None = None
    perp_neg_weights: list[Tensor] = field(default_factory=list)
    score: Callable[[Tensor, Tensor], Tensor] | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)

    @property
    def corrects_x0(self) -> bool:
        """Whether :meth:`correct_x0` changes anything."""
        return self.data_range is not None or self.backdrop is not None

    def add_noise(self, eps: Tensor) -> Tensor:
        """Return z_t of x at the step's timesteps."""
        return add_noise(self.x, eps, self.alphas_cumprod[self.t])

    def guide(self, z: Tensor, t: Tensor, settings: SharedSettings) -> tuple[Tensor, Tensor]:
        """Return eps_hat under classifier-free guidance, rescale and threshold, and eps_y; at s = 1 one prediction."""
        if settings.scale == 1:
            (eps_y,) = self.predict(z, t, "prompt")
            return self.correct_x0(eps_y, z, t, settings), eps_y
        eps_y, eps_perp, eps_0 = self.predict_with_perp_neg(z, t, "negative")
        eps_hat = rules.classifier_free_guidance(eps_perp, eps_0, settings.scale)
        eps_hat = rules.rescale_cfg(eps_hat, eps_y, z, self.alphas_cumprod[t], settings.rescale)
        return self.correct_x0(eps_hat, z, t, settings), eps_y

    def predict_with_perp_neg(self, z: Tensor, t: Tensor, *references: str) -> list[Tensor]:
        """Return eps_y, eps_y under Perp-Neg, and the predictions of the references.

        Args:
            z: noisy data [B, C, h, w].
            t: timesteps [B].
            references: branches; Perp-Neg is measured from the first.
        """
        names = [f"perp_neg {k}" for k in range(len(self.perp_neg_weights))]
        eps_y, *others = self.predict(z, t, "prompt", *references, *names)
        eps_references, negatives = others[: len(references)], others[len(references) :]
        eps_perp = rules.perp_neg(eps_y, eps_references[0], negatives, self.perp_neg_weights) if negatives else eps_y
        return [eps_y, eps_perp, *eps_references]

    def correct_x0(self, eps_hat: Tensor, z: Tensor, t: Tensor, settings: SharedSettings) -> Tensor:
        """Return eps_hat with its x0_hat clamped to the data range and put on the true backdrop, by the settings."""
        if not self.corrects_x0:
            return eps_hat
        alpha_bar = self.alphas_cumprod[t]
        x0 = x0_from_eps(eps_hat, z, alpha_bar)
        if self.data_range is not None:
            low, high = self.data_range
            self.metrics["clamped"] = metric(((x0 < low) | (x0 > high)).double().mean())
            if settings.threshold == "static":
                x0 = x0.clamp(low, high)
            else:
                x0 = rules.dynamic_threshold(x0, self.data_range, settings.threshold_quantile)
        if self.backdrop is not None:
            x0 = rules.replace_backdrop(x0, self.backdrop, settings.backdrop_width)
        return eps_from_x0(x0, z, alpha_bar)

    def invert(self, t_end: Tensor, steps: int, scale: float) -> Tensor:
        """Return x inverted by DDIM up to timesteps t_end [B] in `steps` equal moves; scale 0: empty prompt alone."""
        z, t = self.x, torch.zeros_like(t_end)
        alpha_bar = torch.ones(t_end.shape[0], device=t_end.device)  # x itself is clean
        for k in range(1, steps + 1):
            if scale == 0:
                (eps,) = self.predict(z, t, "empty")
            else:
                eps_y, eps_0 = self.predict(z, t, "prompt", "empty")
                eps = rules.classifier_free_guidance(eps_y, eps_0, scale)
            t = (t_end * k) // steps
            z = rules.ddim_step(z, eps, alpha_bar, self.alphas_cumprod[t])
            alpha_bar = self.alphas_cumprod[t]
        return z


def _sds(p: StepInputs, s: SharedSettings) -> Residual:
    z_t = p.add_noise(p.eps)
    eps_hat, eps_y = p.guide(z_t, p.t, s)
    return Residual(rules.sds(eps_hat, p.eps), eps_hat, eps_y, z_t)


def _sjc(p: StepInputs, s: SharedSettings) -> Residual:
    z_t = p.add_noise(p.eps)
    eps_hat, eps_y = p.guide(z_t, p.t, s)
    return Residual(rules.sjc(eps_hat), eps_hat, eps_y, z_t)


def _csd(p: StepInputs, s: SharedSettings) -> Residual:
    """residual = eps_hat - reference with eps_hat = reference + s (eps_y - reference), its x0_hat corrected."""
    z_t = p.add_noise(p.eps)
    negative = s.rule.negative_share.at(p.progress)
    if negative == 0:
        eps_y, eps_perp, reference = p.predict_with_perp_neg(z_t, p.t, "empty")
        residual = rules.csd(eps_perp, reference)
    elif negative == 1 and not p.perp_neg_weights:  # Perp-Neg is measured from the empty prompt
        eps_y, eps_perp, reference = p.predict_with_perp_neg(z_t, p.t, "negative")
        residual = rules.csd(eps_perp, reference)
    else:
        eps_y, eps_perp, eps_0, eps_n = p.predict_with_perp_neg(z_t, p.t, "empty", "negative")
        reference = eps_0 + negative * (eps_n - eps_0)
        residual = rules.csd(eps_perp, eps_0, eps_n, negative)
    return _contrast_residual(reference, s.scale * residual, eps_y, z_t, p, s)


def _nfsd(p: StepInputs, s: SharedSettings) -> Residual:
    """residual = eps_hat at low noise and eps_hat - eps_n above, eps_hat = eps_0 + s (eps_y - eps_0)."""
    z_t = p.add_noise(p.eps)
    eps_y, eps_perp, eps_0, eps_n = p.predict_with_perp_neg(z_t, p.t, "empty", "negative")
    low_noise = ~at_or_above_sd_noise(0.2, p.alphas_cumprod[p.t])
    residual = rules.nfsd(eps_perp, eps_0, eps_n, s.scale, low_noise)
    reference = torch.where(per_sample(low_noise, eps_n).bool(), torch.zeros_like(eps_n), eps_n)
    return _contrast_residual(reference, residual, eps_y, z_t, p, s)


def _contrast_residual(
    reference: Tensor, residual: Tensor, eps_y: Tensor, z_t: Tensor, p: StepInputs, s: SharedSettings
) -> Residual:
    """Return a residual eps_hat - reference with the x0_hat of its eps_hat corrected."""
    eps_hat = reference + residual
    if p.corrects_x0:
        eps_hat = p.correct_x0(eps_hat, z_t, p.t, s)
        residual = eps_hat - reference
    return Residual(residual, eps_hat, eps_y, z_t)


def _ism(p: StepInputs, s: SharedSettings) -> Residual:
    delta = round(s.rule.delta.at(p.progress) * p.alphas_cumprod.shape[0])
    t_s = (p.t - max(delta, 1)).clamp_min(0)
    z_s = p.invert(t_s, s.rule.inversion_steps, scale=0)
    (eps_s,) = p.predict(z_s, t_s, "empty")
    z_t = rules.ddim_step(z_s, eps_s, p.alphas_cumprod[t_s], p.alphas_cumprod[p.t])
    eps_hat, eps_y = p.guide(z_t, p.t, s)
    return Residual(rules.ism(eps_hat, eps_s), eps_hat, eps_y, z_t)


def _sdi(p: StepInputs, s: SharedSettings) -> Residual:
    """SDS with the noise that DDIM inversion reads off x (arXiv 2405.15891 alg. 1) in place of a random one."""
    z_t = p.invert(p.t, s.rule.inversion_steps, scale=s.rule.inversion_scale)
    alpha_bar = p.alphas_cumprod[p.t]
    eps = (z_t - per_sample(alpha_bar.sqrt(), z_t) * p.x) / per_sample((1 - alpha_bar).sqrt(), z_t)
    eps_hat, eps_y = p.guide(z_t, p.t, s)
    return Residual(rules.sds(eps_hat, eps), eps_hat, eps_y, z_t)


def _vsd(p: StepInputs, s: SharedSettings) -> Residual:
    z_t = p.add_noise(p.eps)
    eps_hat, eps_y = p.guide(z_t, p.t, s)
    return Residual(rules.vsd(eps_hat, p.score(z_t, p.t)), eps_hat, eps_y, z_t)


def _cfg_predictions(s: SharedSettings, prompts: ViewPrompts) -> int:
    return 1 if s.scale == 1 else 2


def _contrast_predictions(s: SharedSettings, prompts: ViewPrompts) -> int:
    return 3 if any(prompts.negatives()) else 2  # without one the negative and the empty prompt are the same


@dataclass(frozen=True)
class Rule:
    """An entry of RULES: everything that other modules read of a rule.

    Args:
        residual: (StepInputs, settings) -> Residual.
        settings: the model of the rule's own settings.
        needs: "words", a prior that reads prompts; "invertible", one whose noise can be read off a clean image;
            "trainable", one whose network can learn the score of the renders (vsd.py); "negative", a negative prompt.
        predictions: (settings, prompts) -> the largest number of predictions a view in one batch, without Perp-Neg's.
        contrast: whether it compares predictions in place of guiding one: it has a term of its own for the negative
            prompt, and no x0_hat of classifier-free guidance that a rescale is defined on.
        stateful: whether it has a state that a checkpoint holds.
        shaping: names of its settings that determine the shapes of that state.
    """

    residual: Callable[[StepInputs, SharedSettings], Residual]
    settings: type[RuleSettings] = RuleSettings
    needs: frozenset[Need] = frozenset()
    predictions: Callable[[SharedSettings, ViewPrompts], int] = _cfg_predictions
    contrast: bool = False
    stateful: bool = False
    shaping: tuple[str, ...] = ()


_CONTRAST: dict[str, Any] = {"predictions": _contrast_predictions, "contrast": True}
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
    """Return the settings of a rule from its name, or from a mapping of its name and its settings.

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


def max_predictions(settings: SharedSettings, prompts: ViewPrompts) -> int:
    """Return the largest number of predictions a view in one batch: the rule's, and two of Perp-Neg."""
    count = RULES[settings.rule.name].predictions(settings, prompts)
    return count + (2 if prompts.settings.blend == "perp_neg" else 0)
