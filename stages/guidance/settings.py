"""Settings of a stage's guidance: the rule, its schedule and its corrections.

All t, t_min, t_max and a rule's own, are fractions of the prior's own schedule; schedules.py says what that means for
priors whose steps are not as noisy as Stable Diffusion's. What changes over the stage is a Ramp (stages/ramp.py).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, SerializeAsAny, model_validator

from stages.guidance import rules
from stages.guidance.residuals import RULES, RuleSettings, read_rule
from stages.ramp import Ramp, constant


class GuidanceSettings(BaseModel):
    """Settings of a stage's guidance."""

    model_config = ConfigDict(extra="forbid")

    rule: Annotated[SerializeAsAny[RuleSettings], PlainValidator(read_rule)] = Field(
        default_factory=RuleSettings, description="distillation rule: its name, or {name: ..., and its own settings}"
    )
    scale: float = Field(20.0, ge=0, description="guidance scale s = 1 + w; 1 is the plain conditional model")
    rescale: float = Field(0.0, ge=0, le=1, description="CFG rescale phi: give x0 back the conditional one's contrast")
    weighed_for: float | None = Field(
        None,
        gt=0,
        description="scale of plain guidance that the stage's regularisers are weighed for, which then follow this "
        "stage's scale and rescale; none: they stay as they are",
    )
    weighting: Literal["sds", "uniform", "fantasia3d", "x0"] = Field(
        "sds", description="w(t): sigma^2, 1, alpha sigma^2, or sigma / alpha (the residual in x0)"
    )
    timesteps: Literal["uniform", "linear", "sqrt", "dreamtime"] = Field("uniform", description="how t is chosen")
    t_min: Ramp = Field(
        constant(0.02),
        ge=0,
        le=1,
        description="lowest t as a fraction of the prior's steps, whose noise differs by prior",
    )
    t_max: Ramp = Field(Ramp(0.98, 0.5, 0.0, 0.5), ge=0, le=1, description="highest t as such a fraction")
    threshold: Literal["none", "static", "dynamic"] = Field(
        "none", description="x0_hat back into the data range: clamped, or by Imagen's dynamic thresholding"
    )
    threshold_quantile: float = Field(
        0.995, gt=0.5, le=1, description="dynamic: quantile of |x0_hat| of an image that becomes the range's end"
    )
    threshold_range: tuple[float, float] | None = Field(
        None, description="range of the prior's data; none: its own, [-1, 1] for pixels, unknown for latents"
    )
    backdrop_width: float | None = Field(
        None, gt=0, description="width on [-1, 1] of the band about x0_hat's own backdrop that is put on the true one"
    )
    grad_clip: Ramp | None = Field(None, gt=0, description="clamp of the gradient's entries; none: they are left alone")
    image_term: float = Field(
        0.0, ge=0, description="weight of HiFA's term between render and decoded x0_hat; 0 none, 0.01 in the paper"
    )
    srgb: bool = Field(True, description="convert linear renders to sRGB, which priors were trained on")

    def unread(self) -> set[str]:
        """Return the settings that nothing reads as the others stand."""
        off = {"threshold_quantile": self.threshold != "dynamic", "threshold_range": self.threshold == "none"}
        off["weighed_for"] = self.weighed_for is None
        return {name for name, unread in off.items() if unread}

    @property
    def strength(self) -> float:
        """The factor of the stage's regularisers; see `weighed_for`."""
        return 1.0 if self.weighed_for is None else rules.strength(self.scale, self.rescale) / self.weighed_for

    @model_validator(mode="after")
    def _ordered(self) -> GuidanceSettings:
        for share in (k / 100 for k in range(101)):
            low, high = self.t_min.at(share), self.t_max.at(share)
            if low > high:
                raise ValueError(
                    f"t_min, t_max: at {share:g} of the stage the range is [{low:g}, {high:g}], low above high"
                )
        if self.threshold_range is not None and self.threshold_range[0] >= self.threshold_range[1]:
            raise ValueError(f"threshold_range: wanted low < high, got {list(self.threshold_range)}")
        if self.rescale > 0 and RULES[self.rule.name].contrast:
            fitting = ", ".join(name for name, rule in RULES.items() if not rule.contrast)
            raise ValueError(f"rescale: works with the rules {fitting}, got rule {self.rule.name}")
        return self
