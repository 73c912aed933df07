"""Guidance: a prior plus a distillation rule, turning rendered images into a gradient on them.

Scale convention: the loss is SUMMED over the channels and pixels of the prior's space and averaged over the views,
so at x [B, 3, 64, 64] it adds 12,288 terms a view; regulariser weights are tuned to that (DreamFusion-style code's
convention). `scale` is s = 1 + w in eps_0 + s (eps_y - eps_0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.cameras import Views
from stages.errors import UserError, check_shape
from stages.guidance import rules
from stages.guidance.compatibility import check_compatibility, data_range
from stages.guidance.conditions import Conditions
from stages.guidance.guide import GuidanceOutput, Metric, metric
from stages.guidance.picture import draw
from stages.guidance.prior import Prior, ShapePrior, ViewContext, per_sample, resized, x0_from_eps
from stages.guidance.residuals import RULES, Residual, StepInputs
from stages.guidance.schedules import TIMESTEPS, WEIGHTINGS, stratified, to_index
from stages.guidance.settings import GuidanceSettings
from stages.guidance.vsd import Lesson, RenderScore, camera_vector
from stages.kernels.srgb import linear_to_srgb
from stages.parallel import WHOLE, Draws, Part
from stages.phases import phase
from stages.prompts import ViewPrompts

if TYPE_CHECKING:
    from stages.render.shade import Shading
    from stages.render.volume import Radiance

__all__ = ["Guidance", "GuidanceOutput", "GuidanceSettings"]


class Guidance:
    """A Guide (guide.py): score distillation from a prior by a rule.

    Metrics of a call:
        agreement_db: PSNR in dB between x and the prior's denoised x0 (conditional branch), data range 2; higher is
            closer to what the prior would draw.
        t: mean timestep, as a fraction of the schedule.
        t_max: upper end of the range that t is drawn from, as a fraction.
        grad_rms: root mean square of the gradient on x.
        nonfinite: share of gradient entries that the prior returned as NaN or infinity and that were dropped.
        clamped: with a threshold, the share of the guided x0_hat's entries outside the data range.
        clipped: with grad_clip, the share of the gradient's entries that it clamped.
        score_error: with vsd, the mean squared error of the score of the renders; -1 marks a step it did not take.

    Args:
        prior: any :class:`stages.guidance.prior.Prior`; prompts are embedded here.
        settings: rule, schedule and weights.
        prompts: the texts of a run by view.
        generator: on the CPU, and of this guidance alone: all its randomness.
        release_text: whether the prior's text encoder is freed once the prompts are embedded.
    Raises: UserError for a rule or setting that does not work with this prior or these prompts.

    Example:
        >>> guidance = Guidance(load_prior("pocket"), GuidanceSettings(), ViewPrompts("a red mug"), torch.Generator())
        >>> guidance(images, views, progress=0.5).loss.backward()
    """

    def __init__(
        self,
        prior: Prior,
        settings: GuidanceSettings,
        prompts: ViewPrompts,
        generator: torch.Generator,
        *,
        release_text: bool = True,
    ) -> None:
        self.prior, self.settings, self.prompts, self.generator = prior, settings, prompts, generator
        self._draws, self._lessons = Draws(generator), []
        self._warp: Tensor | None = None
        check_compatibility(prior, settings, prompts)
        self._data_range = data_range(prior, settings)
        self._alphas_cumprod: dict[torch.device, Tensor] = {}
        self._conditions = Conditions(prior, prompts, release_text=release_text)
        self._score = (
            RenderScore(prior, settings.rule, generator) if "trainable" in RULES[settings.rule.name].needs else None
        )

    def __call__(
        self,
        images: Tensor,
        views: Views,
        progress: float,
        textureless: bool = False,
        *,
        backdrop: Tensor | None = None,
        shading: Shading | None = None,
        part: Part = WHOLE,
    ) -> GuidanceOutput:
        """Return the distillation loss of linear images [B, H, W, 3] in [0, 1] seen from B views; see Guide."""
        check_shape("images", images, (len(views), None, None, 3))
        s = self.settings
        stream, generator = self._draws.of_part(part)
        t_host, low_high = self._timesteps(len(views), progress, part, stream)
        with phase("encode"):
            pictures = linear_to_srgb(images) if s.srgb else images
            x = self.prior.encode(pictures, generator)
        eps = torch.randn(x.shape, generator=generator).to(x)
        seen = views if self._warp is None else views.through(self._warp)
        context = ViewContext(seen, backdrop if backdrop is None else backdrop.detach(), shading)
        conditions, t = self._conditions.for_views(views, textureless).on_device(x.device, t_host)
        alphas_cumprod, camera = self._levels(x.device), camera_vector(views)

        def prior_t(t_asked: Tensor) -> Tensor:
            if self.prior.reads_t_anywhere:
                return t_asked
            return t_host if t_asked is t else t_asked.cpu()

        def predict(z: Tensor, t: Tensor, *names: str) -> list[Tensor]:
            names, groups = conditions.distinct(*names)
            k = len(names)
            eps = self.prior.predict_noise(
                z.repeat(k, 1, 1, 1), prior_t(t).repeat(k), conditions.embedding(*names), context.repeat(k)
            )
            chunks = eps.to(z.dtype).chunk(k)
            return [chunks[group] for group in groups]

        def score(z: Tensor, t: Tensor) -> Tensor:
            return self._score.predict(z, prior_t(t), conditions.embedding("prompt"), camera, context)

        with torch.no_grad(), phase("rule"):
            inputs = StepInputs(
                x.detach(),
                eps,
                t,
                alphas_cumprod,
                progress,
                predict,
                data_range=self._data_range,
                backdrop=self._encode_backdrop(backdrop, images, generator),
                perp_neg_weights=conditions.perp_neg_weights,
                score=score,
            )
            result = RULES[s.rule.name].residual(inputs, s)
            alpha_bar = alphas_cumprod[t]
            w_t = WEIGHTINGS[s.weighting](alpha_bar)
            gradient, nonfinite = _drop_nonfinite(per_sample(w_t, x) * result.residual, self.prior.name)
            metrics = {
                "agreement_db": _agreement_db(x0_from_eps(result.eps_y, result.z_t, alpha_bar), x),
                "t": float(t_host.double().mean()) / alphas_cumprod.shape[0],
                "t_max": low_high[1],
            } | inputs.metrics
            if s.grad_clip is not None:
                limit = s.grad_clip.at(progress)
                metrics["clipped"] = metric((gradient.abs() > limit).double().mean())
                gradient = rules.clip_gradient(gradient, limit)
            metrics |= {"grad_rms": metric(gradient.square().mean().sqrt()), "nonfinite": nonfinite}
        loss = rules.surrogate(x, gradient)
        if s.image_term > 0:
            loss = loss + self._image_term(pictures, result, s.image_term * w_t, alpha_bar)
        if self._score is not None:
            with phase("score"):
                embedding = conditions.embedding("prompt")
                lesson = Lesson(x.detach(), embedding, camera, generator, context, 1 / part.count)
                metrics["score_error"] = self._taught(lesson, part)
        return GuidanceOutput(loss, metrics, s.strength)

    @property
    def prompt(self) -> str:
        """Return the prompt itself, without words of a view."""
        return self.prompts.prompt

    def picture(self, views: Views, *, steps: int, scale: float, generator: torch.Generator) -> Tensor:
        """Return sRGB pictures [B, H, W, 3] in [0, 1] of the prompt seen from B views; see picture.draw."""
        return draw(self.prior, self._conditions.for_views(views), views, steps, scale, generator)

    def shape(self) -> Radiance | None:
        """Return the prompt's object as density and colour at points, where the prior knows it in 3D; else None."""
        known = self.prior.shape(self._conditions.front) if isinstance(self.prior, ShapePrior) else None
        warp = self._warp
        if known is None or warp is None:
            return known
        return lambda points: known(points @ warp[:3, :3].T.to(points) + warp[:3, 3].to(points))

    def warp(self, matrix: Tensor) -> None:
        """Make the prior see the world through an affine map; see WarpedGuide."""
        self._warp = matrix

    def _taught(self, lesson: Lesson, part: Part) -> float:
        """Teach the score once a step, of all its parts; returns what makes their mean the error of that lesson."""
        self._lessons = [] if part.first else self._lessons
        self._lessons.append(lesson)
        if not part.last:
            return 0.0
        return part.count * self._score.train(self._lessons, split=len(self._lessons) < part.count)

    def _encode_backdrop(self, backdrop: Tensor | None, images: Tensor, generator: torch.Generator) -> Tensor | None:
        """Return the backdrop in the prior's space, where the settings want x0_hat put on it; else None."""
        if self.settings.backdrop_width is None:
            return None
        if backdrop is None:
            raise ValueError("backdrop: wanted what the images were composited on, for backdrop_width; got None")
        pictures = backdrop.detach().expand_as(images)
        return self.prior.encode(linear_to_srgb(pictures) if self.settings.srgb else pictures, generator)

    def _image_term(self, pictures: Tensor, result: Residual, weight: Tensor, alpha_bar: Tensor) -> Tensor:
        """HiFA's second half: sRGB renders [B, H, W, 3] against what the rule's x0_hat decodes to."""
        pixels = resized(pictures.permute(0, 3, 1, 2), self.prior.resolution).permute(0, 2, 3, 1) * 2 - 1
        with torch.no_grad():
            decoded = self.prior.decode(x0_from_eps(result.eps_hat, result.z_t, alpha_bar)).to(pixels) * 2 - 1
            residual = per_sample(weight, pixels) * rules.image_term(pixels.detach(), decoded, alpha_bar)
            residual, _ = _drop_nonfinite(residual, self.prior.name)
        return rules.surrogate(pixels, residual)

    def _timesteps(
        self, batch: int, progress: float, part: Part, stream: torch.Generator
    ) -> tuple[Tensor, tuple[float, float]]:
        """The timesteps of a part's views, stratified over the whole step, and the ends of their range."""
        s, steps = self.settings, self.prior.alphas_cumprod.shape[0]
        low = s.t_min.at(progress)
        high = max(low, s.t_max.at(progress))  # ramps of two shapes may cross between the shares that were checked
        u = stratified(batch * part.count, stream)[batch * part.index : batch * (part.index + 1)]
        fraction = TIMESTEPS[s.timesteps](progress, low, high, u, self.prior.alphas_cumprod)
        return to_index(fraction, low, high, steps), (low, high)

    def _levels(self, device: torch.device) -> Tensor:
        """The prior's noise levels [T] on a device; brought there once."""
        if device.type == "cpu":
            return self.prior.alphas_cumprod
        if device not in self._alphas_cumprod:
            self._alphas_cumprod[device] = self.prior.alphas_cumprod.to(device)
        return self._alphas_cumprod[device]

    def check(self, metrics: dict[str, Metric]) -> None:
        """Raise UserError where nothing that the prior predicted in a step was finite."""
        if metrics["nonfinite"] == 1:
            raise _nothing_finite(self.prior.name)

    def close(self) -> None:
        """Leave the prior as it was before: remove vsd's changes of its network."""
        if self._score is not None:
            self._score.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that makes a resumed guidance equal to an uninterrupted one: the generator, and vsd's score."""
        state = {"generator": self.generator.get_state()}
        if self._score is not None:
            state |= {f"score.{key}": value for key, value in self._score.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what state_dict returned."""
        self.generator.set_state(state["generator"])
        if self._score is not None:
            self._score.load_state_dict(
                {key.removeprefix("score."): value for key, value in state.items() if key.startswith("score.")}
            )


def _agreement_db(x0: Tensor, x: Tensor) -> Metric:
    """Return the PSNR of x0 against x, data range 2, within +-100 dB."""
    error = torch.nan_to_num((x0 - x).square().mean(), nan=1e10).clamp(1e-10, 1e10)
    return metric(10 * torch.log10(4 / error))


def _drop_nonfinite(gradient: Tensor, prior: str) -> tuple[Tensor, Metric]:
    """Return the gradient with non-finite entries set to 0, and their share. Raises: UserError where all are.

    On a device that would wait for it; there Guidance.check raises, once the step's metrics are read.
    """
    finite = torch.isfinite(gradient)
    share = metric(1 - finite.double().mean())
    if isinstance(share, float) and share in (0, 1):
        if share == 1:
            raise _nothing_finite(prior)
        return gradient, 0.0
    return torch.where(finite, gradient, torch.zeros_like(gradient)), share


def _nothing_finite(prior: str) -> UserError:
    return UserError(
        f"The prior {prior} returned no finite number",
        "every predicted noise value is NaN or infinite, which half precision does on some models",
        "set the prior's dtype to float32 (or bfloat16)",
    )
