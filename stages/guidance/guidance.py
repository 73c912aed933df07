"""Guidance: a prior plus a distillation rule, turning rendered images into a gradient on them.

Scale convention: the loss is SUMMED over the channels and pixels of the prior's space and averaged over the views,
so at x [B, 3, 64, 64] it adds 12,288 terms a view; regulariser weights are tuned to that (DreamFusion-style code's
convention). `scale` is s = 1 + w in eps_0 + s (eps_y - eps_0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from stages.cameras import Views, linear_to_srgb
from stages.errors import UserError, check_shape
from stages.guidance import rules
from stages.guidance.prior import Prior, ViewContext, add_noise, per_sample, x0_from_eps
from stages.guidance.schedules import TIMESTEPS, WEIGHTINGS, anneal, stratified, to_index
from stages.prompts import ViewPrompts

Fraction = tuple[float, float]


class GuidanceSettings(BaseModel):
    """How a stage is guided."""

    model_config = ConfigDict(extra="forbid")

    rule: Literal["sds", "sjc", "csd", "nfsd", "ism", "sdi"] = Field("sds", description="distillation rule")
    scale: float = Field(20.0, ge=0, description="guidance scale s = 1 + w; 1 is the plain conditional model")
    rescale: float = Field(0.0, ge=0, le=1, description="CFG rescale phi: give x0 back the conditional one's contrast")
    weighting: Literal["sds", "uniform", "fantasia3d", "x0"] = Field(
        "sds", description="w(t): sigma^2, 1, alpha sigma^2, or sigma / alpha (the residual in x0)"
    )
    timesteps: Literal["uniform", "linear", "sqrt", "dreamtime"] = Field("uniform", description="how t is chosen")
    t_range: Fraction = Field((0.02, 0.98), description="lowest and highest t as fractions of the schedule")
    t_min_end: float | None = Field(None, ge=0, le=1, description="lowest t at the end of annealing; none: constant")
    t_max_end: float | None = Field(0.5, ge=0, le=1, description="highest t at the end of annealing; none: constant")
    t_anneal: Fraction = Field((0.0, 0.5), description="shares of the stage between which the t range is annealed")
    grad_clip: tuple[float, float] | None = Field(None, description="clamp of the gradient's entries, start to end")
    negative_anneal: Fraction = Field((0.0, 0.5), description="csd: shares between which the negative prompt fades in")
    ism_delta: Fraction = Field((0.1, 0.025), description="ism: t - s as a fraction of the schedule, start to end")
    inversion_steps: int = Field(5, ge=1, le=50, description="ism, sdi: DDIM inversion steps from clean to noisy")
    inversion_scale: float = Field(-7.5, description="sdi: guidance scale s of the inversion")
    srgb: bool = Field(True, description="convert linear renders to sRGB, which priors were trained on")

    @model_validator(mode="after")
    def _ordered(self) -> GuidanceSettings:
        for name in ("t_range", "t_anneal", "negative_anneal"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"{name}: wanted 0 <= low <= high <= 1, got [{low}, {high}]")
        low, high = self.t_range if self.t_min_end is None else (self.t_min_end, self.t_range[1])
        high = high if self.t_max_end is None else self.t_max_end
        if low > high:
            raise ValueError(f"t_min_end, t_max_end: the range ends as [{low}, {high}], low above high")
        for name in ("grad_clip", "ism_delta"):
            value = getattr(self, name)
            if value is not None and min(value) <= 0:
                raise ValueError(f"{name}: wanted two positive numbers, got {list(value)}")
        if self.rescale > 0 and self.rule not in ("sds", "sjc", "ism", "sdi"):
            raise ValueError(f"rescale: works with the rules sds, sjc, ism and sdi, got rule {self.rule}")
        return self


@dataclass
class GuidanceOutput:
    """loss: a surrogate whose gradient matters, not its value. metrics: finite floats that do mean something.

    agreement_db: PSNR in dB between x and the prior's own denoised x0 (conditional branch), data range 2; higher is
        closer to what the prior would draw. t: mean timestep as a fraction. grad_rms: root mean square of the gradient
        on x. nonfinite: share of gradient entries that the prior returned as NaN or infinity and that were dropped.
    """

    loss: Tensor
    metrics: dict[str, float]


@dataclass
class Problem:
    """One step as a rule sees it; `predict(z, t, *branches)` evaluates branches prompt / negative / empty at once."""

    x: Tensor
    eps: Tensor
    t: Tensor
    alphas_cumprod: Tensor
    progress: float
    predict: Callable[..., list[Tensor]]

    def noisy(self, eps: Tensor) -> Tensor:
        return add_noise(self.x, eps, self.alphas_cumprod[self.t])

    def guided(self, z: Tensor, t: Tensor, settings: GuidanceSettings) -> tuple[Tensor, Tensor]:
        """(eps_hat under classifier-free guidance and rescale, eps_y); one prediction only where s = 1."""
        if settings.scale == 1:
            (eps_y,) = self.predict(z, t, "prompt")
            return eps_y, eps_y
        eps_y, eps_0 = self.predict(z, t, "prompt", "negative")
        eps_hat = rules.guided(eps_y, eps_0, settings.scale)
        return rules.rescaled(eps_hat, eps_y, z, self.alphas_cumprod[t], settings.rescale), eps_y

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


# A rule's glue: which predictions it needs. Returns (residual, eps_y at (z_t, t), z_t).
Rule = Callable[[Problem, GuidanceSettings], tuple[Tensor, Tensor, Tensor]]


def _sds(p: Problem, s: GuidanceSettings) -> tuple[Tensor, Tensor, Tensor]:
    z_t = p.noisy(p.eps)
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return rules.sds(eps_hat, p.eps), eps_y, z_t


def _sjc(p: Problem, s: GuidanceSettings) -> tuple[Tensor, Tensor, Tensor]:
    z_t = p.noisy(p.eps)
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return rules.sjc(eps_hat), eps_y, z_t


def _csd(p: Problem, s: GuidanceSettings) -> tuple[Tensor, Tensor, Tensor]:
    z_t = p.noisy(p.eps)
    eps_y, eps_0, eps_n = p.predict(z_t, p.t, "prompt", "empty", "negative")
    return s.scale * rules.csd(eps_y, eps_0, eps_n, anneal(0.0, 1.0, s.negative_anneal, p.progress)), eps_y, z_t


def _nfsd(p: Problem, s: GuidanceSettings) -> tuple[Tensor, Tensor, Tensor]:
    z_t = p.noisy(p.eps)
    eps_y, eps_0, eps_n = p.predict(z_t, p.t, "prompt", "empty", "negative")
    low_noise = p.t < 0.2 * p.alphas_cumprod.shape[0]
    return rules.nfsd(eps_y, eps_0, eps_n, s.scale, low_noise), eps_y, z_t


def _ism(p: Problem, s: GuidanceSettings) -> tuple[Tensor, Tensor, Tensor]:
    delta = round(anneal(s.ism_delta[0], s.ism_delta[1], (0.0, 1.0), p.progress) * p.alphas_cumprod.shape[0])
    t_s = (p.t - max(delta, 1)).clamp_min(0)
    z_s = p.invert(t_s, s.inversion_steps, scale=0)
    (eps_s,) = p.predict(z_s, t_s, "empty")
    z_t = rules.ddim_step(z_s, eps_s, p.alphas_cumprod[t_s], p.alphas_cumprod[p.t])
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return rules.ism(eps_hat, eps_s), eps_y, z_t


def _sdi(p: Problem, s: GuidanceSettings) -> tuple[Tensor, Tensor, Tensor]:
    """SDS whose noise is the one that DDIM inversion finds in x (arXiv 2405.15891 alg. 1) in place of a random one."""
    z_t = p.invert(p.t, s.inversion_steps, scale=s.inversion_scale)
    alpha_bar = p.alphas_cumprod[p.t]
    eps = (z_t - per_sample(alpha_bar.sqrt(), z_t) * p.x) / per_sample((1 - alpha_bar).sqrt(), z_t)
    eps_hat, eps_y = p.guided(z_t, p.t, s)
    return rules.sds(eps_hat, eps), eps_y, z_t


RULES: dict[str, Rule] = {"sds": _sds, "sjc": _sjc, "csd": _csd, "nfsd": _nfsd, "ism": _ism, "sdi": _sdi}


class Guidance:
    """A prior asked under the prompts of the views, with all its randomness in one generator.

    Args:
        prior: any :class:`stages.guidance.prior.Prior`; prompts are embedded here and its text encoder released.
        settings: rule, schedule and weights. prompts: the words by view. generator: a CPU generator of its own.
    """

    def __init__(
        self, prior: Prior, settings: GuidanceSettings, prompts: ViewPrompts, generator: torch.Generator
    ) -> None:
        self.prior, self.settings, self.prompts, self.generator = prior, settings, prompts, generator
        texts = list(dict.fromkeys([*prompts.all_texts(), ""]))
        self._index = {text: i for i, text in enumerate(texts)}
        self._embeddings: Any = prior.embed(texts)
        release = getattr(prior, "release_text_encoder", None)
        if release is not None:
            release()

    def __call__(
        self,
        images: Tensor,
        views: Views,
        progress: float,
        textureless: bool = False,
        *,
        background: Tensor | None = None,
        shading: Any = None,
    ) -> GuidanceOutput:
        """The distillation loss of linear images [B, H, W, 3] in [0, 1] seen from B views.

        Args:
            images: linear colour, differentiable. views: their cameras. progress: share of the stage done, in [0, 1].
            textureless: the images are textureless renders (chooses the words).
            background, shading: what the stage composited on (linear [B, H, W, 3]) and shaded with; see ViewContext.
        """
        check_shape("images", images, (len(views), None, None, 3))
        s, alphas_cumprod = self.settings, self.prior.alphas_cumprod
        if s.srgb:
            images = linear_to_srgb(images)
        t, low_high = self._timesteps(len(views), progress)
        x = self.prior.encode(images, self.generator)
        eps = torch.randn(x.shape, generator=self.generator).to(x)
        context = ViewContext(views, background if background is None else background.detach(), shading)
        branches = {"prompt": [self._index[text] for text in self.prompts.texts(views, textureless)]}
        branches["negative"] = [self._index[self.prompts.negative]] * len(views)
        branches["empty"] = [self._index[""]] * len(views)

        def predict(z: Tensor, t: Tensor, *names: str) -> list[Tensor]:
            rows = torch.tensor([row for name in names for row in branches[name]])
            k = len(names)
            eps = self.prior.predict_noise(
                z.repeat(k, 1, 1, 1), t.repeat(k), self._embeddings[rows], context.repeat(k)
            )
            return list(eps.to(z.dtype).chunk(k))

        with torch.no_grad():
            problem = Problem(x.detach(), eps, t, alphas_cumprod, progress, predict)
            residual, eps_y, z_t = RULES[s.rule](problem, s)
            gradient = per_sample(WEIGHTINGS[s.weighting](alphas_cumprod[t]), x) * residual
            gradient, nonfinite = _finite(gradient, self.prior.name)
            if s.grad_clip is not None:
                gradient = rules.clipped(gradient, anneal(*s.grad_clip, (0.0, 1.0), progress))
            error = (x0_from_eps(eps_y, z_t, alphas_cumprod[t]) - x).square().mean()
            error = torch.nan_to_num(error, nan=1e10).clamp(1e-10, 1e10)
            metrics = {
                "agreement_db": float(10 * torch.log10(4 / error)),
                "t": float(t.double().mean()) / alphas_cumprod.shape[0],
                "t_max": low_high[1],
                "grad_rms": float(gradient.square().mean().sqrt()),
                "nonfinite": nonfinite,
            }
        return GuidanceOutput(rules.surrogate(x, gradient), metrics)

    def _timesteps(self, batch: int, progress: float) -> tuple[Tensor, tuple[float, float]]:
        s, steps = self.settings, self.prior.alphas_cumprod.shape[0]
        low = anneal(s.t_range[0], s.t_min_end, s.t_anneal, progress)
        high = max(low, anneal(s.t_range[1], s.t_max_end, s.t_anneal, progress))
        u = stratified(batch, self.generator)
        fraction = TIMESTEPS[s.timesteps](progress, low, high, u, self.prior.alphas_cumprod)
        return to_index(fraction, low, high, steps), (low, high)

    def state_dict(self) -> dict[str, Tensor]:
        """The generator's state: all that makes a resumed guidance equal to an uninterrupted one."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of state_dict."""
        self.generator.set_state(state["generator"])


def _finite(gradient: Tensor, prior: str) -> tuple[Tensor, float]:
    """The gradient with non-finite entries dropped, and their share; refuses when nothing finite is left."""
    finite = torch.isfinite(gradient)
    share = 1 - float(finite.double().mean())
    if share == 0:
        return gradient, 0.0
    if share == 1:
        raise UserError(
            f"The prior {prior} returned no finite number",
            "every predicted noise value is NaN or infinite, which half precision does on some models",
            "set the prior's dtype to float32 (or bfloat16)",
        )
    return torch.where(finite, gradient, torch.zeros_like(gradient)), share
