"""Guidance: a prior plus a distillation rule, turning rendered images into a gradient on them.

Scale convention: the loss is SUMMED over the channels and pixels of the prior's space and averaged over the views,
so at x [B, 3, 64, 64] it adds 12,288 terms a view; regulariser weights are tuned to that (DreamFusion-style code's
convention). `scale` is s = 1 + w in eps_0 + s (eps_y - eps_0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.cameras import Views, linear_to_srgb
from stages.errors import UserError, check_shape
from stages.guidance import rules
from stages.guidance.prior import Prior, ViewContext, per_sample, x0_from_eps
from stages.guidance.residuals import RULES, Problem
from stages.guidance.schedules import TIMESTEPS, WEIGHTINGS, anneal, stratified, to_index
from stages.guidance.settings import GuidanceSettings
from stages.phases import phase
from stages.prompts import ViewPrompts

__all__ = ["Guidance", "GuidanceOutput", "GuidanceSettings"]


@dataclass
class GuidanceOutput:
    """loss: a surrogate whose gradient matters, not its value. metrics: finite floats that do mean something.

    agreement_db: PSNR in dB between x and the prior's own denoised x0 (conditional branch), data range 2; higher is
        closer to what the prior would draw. t: mean timestep as a fraction. grad_rms: root mean square of the gradient
        on x. nonfinite: share of gradient entries that the prior returned as NaN or infinity and that were dropped.
    clamped: with a threshold, the share of the guided x0_hat's entries that lay outside the data range.
    """

    loss: Tensor
    metrics: dict[str, float]


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
        self._data_range = data_range(prior, settings)
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
        t, low_high = self._timesteps(len(views), progress)
        with phase("encode"):
            x = self.prior.encode(linear_to_srgb(images) if s.srgb else images, self.generator)
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

        with torch.no_grad(), phase("rule"):
            problem = Problem(x.detach(), eps, t, alphas_cumprod, progress, predict, self._data_range)
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
            } | problem.metrics
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


def data_range(prior: Prior, settings: GuidanceSettings) -> tuple[float, float] | None:
    """The range x0_hat is brought back to, None without a threshold; UserError where the prior's range is not known."""
    if settings.threshold == "none":
        return None
    found = settings.threshold_range or getattr(prior, "data_range", None)
    if found is None:
        raise UserError(
            f"threshold={settings.threshold} does not fit the prior {prior.name}",
            "its data are latents, whose range is not stated",
            "give threshold_range=[LOW, HIGH] beside it, or set threshold=none for this stage",
        )
    return found


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
