"""How a stage is guided: the rule, its schedule and its cures, as settings.

All t, in ranges, caps, annealing and ism_delta, are fractions of the prior's own schedule; schedules.py says what that
means for priors whose steps are not as noisy as Stable Diffusion's.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages.guidance.vsd import VsdSettings

Fraction = tuple[float, float]


class GuidanceSettings(BaseModel):
    """How a stage is guided."""

    model_config = ConfigDict(extra="forbid")

    rule: Literal["sds", "sjc", "csd", "nfsd", "ism", "sdi", "vsd"] = Field("sds", description="distillation rule")
    scale: float = Field(20.0, ge=0, description="guidance scale s = 1 + w; 1 is the plain conditional model")
    rescale: float = Field(0.0, ge=0, le=1, description="CFG rescale phi: give x0 back the conditional one's contrast")
    weighting: Literal["sds", "uniform", "fantasia3d", "x0"] = Field(
        "sds", description="w(t): sigma^2, 1, alpha sigma^2, or sigma / alpha (the residual in x0)"
    )
    timesteps: Literal["uniform", "linear", "sqrt", "dreamtime"] = Field("uniform", description="how t is chosen")
    t_range: Fraction = Field(
        (0.02, 0.98), description="lowest and highest t as fractions of the prior's steps, whose noise differs by prior"
    )
    t_min_end: float | None = Field(None, ge=0, le=1, description="lowest t at the end of annealing; none: constant")
    t_max_end: float | None = Field(0.5, ge=0, le=1, description="highest t at the end of annealing; none: constant")
    t_anneal: Fraction = Field((0.0, 0.5), description="shares of the stage between which the t range is annealed")
    threshold: Literal["none", "static", "dynamic"] = Field(
        "none", description="x0_hat back into the data range: clamped, or by Imagen's dynamic thresholding"
    )
    threshold_quantile: float = Field(
        0.995, gt=0.5, le=1, description="dynamic: quantile of |x0_hat| of an image that becomes the range's end"
    )
    threshold_range: tuple[float, float] | None = Field(
        None, description="range of the prior's data; none: its own, [-1, 1] for pixels, unknown for latents"
    )
    backdrop: float | None = Field(
        None, gt=0, description="width on [-1, 1] of the band about x0_hat's own backdrop that is put on the true one"
    )
    t_caps: list[Fraction] = Field(
        [], description="[[share, t], ...]: from this share of the stage on, no t above; steps, where annealing glides"
    )
    grad_clip: tuple[float, float] | None = Field(None, description="clamp of the gradient's entries, start to end")
    grad_clip_anneal: Fraction = Field((0.0, 1.0), description="shares of the stage between which the clamp widens")
    image_term: float = Field(
        0.0, ge=0, description="weight of HiFA's term between render and decoded x0_hat; 0 none, 0.01 in the paper"
    )
    negative_anneal: Fraction = Field((0.0, 0.5), description="csd: shares between which the negative prompt fades in")
    ism_delta: Fraction = Field((0.1, 0.025), description="ism: t - s as a fraction of the schedule, start to end")
    inversion_steps: int = Field(5, ge=1, le=50, description="ism, sdi: DDIM inversion steps from clean to noisy")
    inversion_scale: float = Field(-7.5, description="sdi: guidance scale s of the inversion")
    vsd: VsdSettings = Field(default_factory=VsdSettings, description="vsd: the score of the renders")
    srgb: bool = Field(True, description="convert linear renders to sRGB, which priors were trained on")

    @model_validator(mode="after")
    def _ordered(self) -> GuidanceSettings:
        for name in ("t_range", "t_anneal", "negative_anneal", "grad_clip_anneal"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"{name}: wanted 0 <= low <= high <= 1, got [{low}, {high}]")
        low, high = self.t_range if self.t_min_end is None else (self.t_min_end, self.t_range[1])
        high = high if self.t_max_end is None else self.t_max_end
        if low > high:
            raise ValueError(f"t_min_end, t_max_end: the range ends as [{low}, {high}], low above high")
        if self.t_caps != sorted(self.t_caps) or not all(0 <= v <= 1 for cap in self.t_caps for v in cap):
            raise ValueError(f"t_caps: wanted shares in order and numbers in [0, 1], got {self.t_caps}")
        if any(cap < self.t_range[0] for _, cap in self.t_caps):
            raise ValueError(f"t_caps: {self.t_caps} goes below the lowest t, {self.t_range[0]}")
        for name in ("grad_clip", "ism_delta"):
            value = getattr(self, name)
            if value is not None and min(value) <= 0:
                raise ValueError(f"{name}: wanted two positive numbers, got {list(value)}")
        if self.threshold_range is not None and self.threshold_range[0] >= self.threshold_range[1]:
            raise ValueError(f"threshold_range: wanted low < high, got {list(self.threshold_range)}")
        if self.rescale > 0 and self.rule not in ("sds", "sjc", "ism", "sdi", "vsd"):
            raise ValueError(f"rescale: works with the rules sds, sjc, ism, sdi and vsd, got rule {self.rule}")
        return self
