"""The coarse stage: score distillation of a text-to-image prior into a hash-grid radiance field (DreamFusion, Magic3D).

One step, top to bottom in :meth:`CoarseStage.step`:
    views, shading, backdrop    <- random
    images                      <- volume render of the field over the backdrop
    loss = guidance(images) + orientation + opacity + entropy + transmittance
    Adam on field and environment

Loss convention: the guidance loss is SUMMED over an image's pixels and channels and averaged over the views (12,288
terms at 64x64x3); the other terms are means over rays, and their weights are tuned to that (threestudio's convention).
Never mix them with weights for averaged losses, which are about 1e4 smaller.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from stages.backdrop import Backdrop, PictureBackdrop, PlainBackdrop
from stages.cameras import CameraSettings, Views, orbit_views, sample_views
from stages.fields.backdrops import BackdropSettings, random_backdrops
from stages.fields.background import Background, BackgroundSettings, random_background
from stages.fields.check import check_object
from stages.fields.hashfield import FieldSettings, HashField, without_gradient
from stages.fields.occupancy import OccupancyGrid, OccupancySettings
from stages.fields.start import StartSettings, fit_start
from stages.guidance.guide import GuidanceOutput, Guide, Metric, ShapeGuide, check_predictions, metric
from stages.kernels.srgb import linear_to_srgb
from stages.likeness import liken
from stages.optimise import GroupedAdam, check_accumulate, under_prefix
from stages.parallel import StepParts, undone_if_lost
from stages.phases import phase
from stages.picture import BEHIND
from stages.ramp import Ramp, constant
from stages.render.shade import ALBEDO, LAMBERT, ShadingSettings, sample_shading
from stages.render.transmittance import TransmittanceSettings, transmittance_loss
from stages.render.volume import Sampling, VolumeImages, render_field
from stages.stage import Asset, add_metrics, contact_sheet, cover_headline, guidance_state, load_guidance_state

SMALLEST = 16  # side of a render, pixels


class CoarseSettings(BaseModel):
    """Settings of the coarse stage without its guidance."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(800, ge=1, description="optimisation steps")
    resolution: int = Field(64, ge=SMALLEST, le=512, description="side of a training render in pixels")
    render_share: Ramp = Field(constant(1.0), gt=0, le=1, description="share of that side, over the stage")
    views_per_step: int = Field(4, ge=1, description="views of one optimiser step")
    accumulate: int = Field(1, ge=1, description="parts that a step's views are rendered in, to bound memory")
    samples: int = Field(80, ge=16, le=2048, description="sampling steps along the diagonal of the box")
    early_stop: float = Field(1e-2, ge=0, lt=1, description="light below which the samples of a ray are left out")
    thin_stride: int = Field(
        4, ge=1, le=16, description="how many times more coarsely the halo of low density is sampled"
    )
    min_optical_depth: float = Field(3e-4, ge=0, lt=1, description="optical depth below which a sample is left out")

    cameras: CameraSettings = Field(default_factory=CameraSettings, description="distribution of views and lights")
    field: FieldSettings = Field(default_factory=FieldSettings, description="the radiance field")
    start: StartSettings = Field(default_factory=StartSettings, description="what the field begins from")
    occupancy: OccupancySettings = Field(default_factory=OccupancySettings, description="empty-space skipping")
    shading: ShadingSettings = Field(default_factory=ShadingSettings, description="mix of shadings")
    background: BackgroundSettings = Field(default_factory=BackgroundSettings, description="what is behind the object")
    backdrops: BackdropSettings = Field(
        default_factory=BackdropSettings, description="pictures behind copies of every view, as CLIP guidance needs"
    )

    orientation: Ramp = Field(
        Ramp(10.0, 1000.0, 0.0, 0.5), ge=0, description="weight of the mean square of normals that face away"
    )
    orientation_always: bool = Field(False, description="also on albedo steps, which then compute normals (slower)")
    opacity: Ramp = Field(constant(1.0), ge=0, description="weight of mean sqrt(opacity^2 + 0.01): keeps space empty")
    entropy: Ramp = Field(
        constant(0.0), ge=0, description="weight of the mean entropy of opacity, against half-open rays"
    )

    transmittance: TransmittanceSettings = Field(
        default_factory=TransmittanceSettings, description="Dream Fields' term against fog"
    )

    lr: Ramp = Field(Ramp(0.01, 0.001, shape="cosine"), gt=0, description="Adam learning rate of table and heads")
    lr_background: Ramp = Field(
        Ramp(0.001, 0.0001, shape="cosine"), gt=0, description="Adam learning rate of the environment"
    )
    betas: tuple[float, float] = Field((0.9, 0.99), description="Adam's decay rates")
    max_skipped: int = Field(20, ge=1, description="non-finite gradients in a row that end the stage")

    preview_size: int = Field(112, ge=16, le=512, description="side of one preview picture in pixels")


class CoarseStage:
    """A Stage (stages/stage.py). Deterministic in its constructor arguments; resumes bitwise from state_dict().

    Args:
        settings: everything but the guidance.
        guidance: see stages/guidance/guidance.py; None where the stage only loads and finishes.
        device: where field and renders live.
        seed: of all that is drawn.
        previous: what an edit goes on from (Magic3D sec. 5): the field of a finished coarse stage and its environment,
            whose settings must be those of these ones. None begins as `settings.start` says.
    Raises: UserError for views that cannot be rendered in equal parts.
    Source: DreamFusion (arXiv 2209.14988), Magic3D (arXiv 2211.10440) sec. 4.1.

    Example:
        >>> stage = CoarseStage(CoarseSettings(steps=200), guidance, torch.device("cpu"), seed=0)
        >>> while stage.step_index < stage.steps:
        ...     metrics = stage.step()
        >>> asset = stage.finish()
    """

    name = "coarse"

    def __init__(
        self,
        settings: CoarseSettings,
        guidance: Guide | None,
        device: torch.device,
        seed: int,
        previous: Asset | None = None,
    ) -> None:
        check_accumulate("coarse", settings.views_per_step, settings.accumulate)
        self.settings, self.guidance, self.device = settings, guidance, torch.device(device)
        self.steps, self.step_index, self.times = settings.steps, 0, {}
        self.generator = torch.Generator().manual_seed(seed)
        self.edits = previous is not None and previous.field is not None
        self.picture = None if previous is None else previous.picture
        liken(guidance, self.picture, self.device)
        self.field = HashField(settings.field, self.generator).to(self.device)
        self.background = Background(settings.background, self.generator).to(self.device)
        if self.edits:
            self.field.load_state_dict(previous.field.state_dict())
            if previous.background is not None:
                self.background.load_state_dict(previous.background.state_dict())
            self._set_progress(0.0)
        self.occupancy = OccupancyGrid(settings.occupancy).to(self.device)
        step_size = 2 * math.sqrt(3) / settings.samples
        self.sampling = Sampling(step_size, settings.early_stop, settings.min_optical_depth, settings.thin_stride)
        self.occupancy.update(self.field.density, 0, 0.0, self.generator, step_size)  # previews before the first step
        self.adam = GroupedAdam(
            [{f"{m}.{k}": p for k, p in getattr(self, m).named_parameters()} for m in ("field", "background")],
            betas=settings.betas,
            eps=1e-15,
            patience=settings.max_skipped,
            stage="coarse",
            advice="lower coarse.lr or the guidance scale; for a half-precision prior set its dtype to float32",
        )

    def step(self) -> dict[str, float]:
        """Take one optimisation step over `views_per_step` views; returns metrics. Raises: RankLost (parallel.py)."""
        with undone_if_lost([self.generator, getattr(self.guidance, "generator", None)], self.occupancy):
            return self._step()

    def _step(self) -> dict[str, float]:
        s, progress, times = self.settings, self.step_index / self.steps, self.times
        begun: dict[str, Metric] = {}
        if self.step_index == 0 and not self.edits and s.start.source == "prior":
            with phase("start", times):
                begun = self._begin()
        self._set_progress(progress)
        with phase("occupancy", times):
            step_size = self.sampling.step_size
            self.occupancy.update(self.field.density, self.step_index, progress, self.generator, step_size)
        with phase("views", times):
            views = sample_views(s.cameras, s.views_per_step, self.generator).to(self.device)
            shading = sample_shading(s.shading, progress, self.generator)
            side = self._side(progress)
            backdrop = self._backdrop(side)

        totals: dict[str, Metric] = {}
        parts = StepParts(s.views_per_step, s.accumulate)
        for part in parts:
            if not part.mine:
                torch.rand(part.views * side * side, generator=self.generator)  # another process's rays
                continue
            part_views, part_backdrop = views[part.slice], backdrop.part(part.slice)
            with phase("render", times):
                images = render_field(
                    self.field,
                    part_backdrop.under,
                    self.occupancy.cells,
                    part_views,
                    side,
                    side,
                    shading=shading,
                    normals=s.orientation_always,
                    sampling=self.sampling,
                    generator=self.generator,
                )
            inputs = part_backdrop.show(images, part_views)
            with phase("guidance", times):
                output = self.guidance(
                    inputs.colour,
                    inputs.views,
                    progress,
                    shading.textureless,
                    backdrop=inputs.backdrop,
                    shading=shading,
                    part=part,
                )
            with phase("regularisers", times):
                loss, metrics = self._regularised(output, images, part_views, progress)
            with phase("backward", times):
                (loss / parts.count).backward()
            add_metrics(totals, output.metrics | metrics, 1 / parts.count)

        if self.picture is not None:
            with phase("picture", times):
                self._hold_picture(side, totals, 1 / parts.copies)
        with phase("optimiser", times):
            parts.join(list(self.adam.parameters.values()), totals)
            totals = begun | totals
            totals["grad_norm"] = self._update(progress, totals)
        check_predictions(self.guidance, totals)
        self.step_index += 1
        return totals

    def _begin(self) -> dict[str, float]:
        """Teach the field the object that the prior knows in 3D, if it knows one; returns what metrics say of it."""
        radiance = self.guidance.shape() if isinstance(self.guidance, ShapeGuide) else None
        if radiance is None:
            return {}
        self.field.set_progress(1.0)
        start = self.settings.start
        return {"start_rms": fit_start(self.field, radiance, start, self.generator, self.sampling.step_size)}

    def _hold_picture(self, side: int, totals: dict[str, Metric], share: float) -> None:
        """Add a share of the gradient of the picture's loss in its view, and of its metrics to `totals`."""
        images = render_field(
            self.field,
            torch.full((3,), BEHIND, device=self.device),
            self.occupancy.cells,
            self.picture.view.to(self.device),
            side,
            side,
            sampling=self.sampling,
            generator=self.generator,
        )
        loss, metrics = self.picture.loss(images.colour, images.opacity, images.depth)
        (share * loss).backward()
        add_metrics(totals, metrics, share)

    def _side(self, progress: float) -> int:
        """Side of this step's renders, pixels."""
        return max(round(self.settings.resolution * self.settings.render_share.at(progress)), SMALLEST)

    def _backdrop(self, side: int) -> Backdrop:
        """Draw what is behind this step's views: pictures, a flat colour each, or the learned environment."""
        s, copies = self.settings, self.settings.backdrops.copies
        if copies:
            pictures = random_backdrops(s.backdrops, s.views_per_step * copies, side, self.generator)
            return PictureBackdrop(pictures.to(self.device), copies)
        colours = random_background(s.background, s.views_per_step, self.generator)
        return PlainBackdrop(self.background if colours is None else colours)

    def _regularised(
        self, guided: GuidanceOutput, images: VolumeImages, views: Views, progress: float
    ) -> tuple[Tensor, dict[str, Metric]]:
        """The guidance loss plus the stage's own terms, and the metrics of these renders."""
        s, opacity = self.settings, images.opacity
        orientation, empty, decided = (guided.strength * w.at(progress) for w in (s.orientation, s.opacity, s.entropy))
        loss = guided.loss + orientation * images.orientation
        loss = loss + empty * (opacity.square() + 0.01).sqrt().mean()
        if decided > 0:
            sure = opacity.clamp(1e-3, 1 - 1e-3)
            loss = loss + decided * nn.functional.binary_cross_entropy(sure, sure)
        if s.transmittance.weight > 0:
            loss = loss + transmittance_loss(opacity, views, progress, s.transmittance)
        metrics = {"cover": metric(opacity.mean()), "samples": float(images.samples)}
        if images.normal is not None:
            metrics["orientation"] = metric(images.orientation)
        return loss, metrics

    def _update(self, progress: float, metrics: dict[str, Metric]) -> float:
        """Take the optimiser step and return the gradient's norm; see GroupedAdam.step."""
        s = self.settings
        return self.adam.step((s.lr.at(progress), s.lr_background.at(progress)), self.step_index, metrics)

    def headline(self, metrics: dict[str, float]) -> str:
        """Return the mean opacity, and how near the renders are to what the prior would draw."""
        return cover_headline(metrics)

    @torch.no_grad()
    def preview(self) -> np.ndarray:
        """Return six views around the object at 20 deg elevation: albedo above, shaded below; uint8 sRGB."""
        size = self.settings.preview_size
        views = orbit_views([0.0, 60.0, 120.0, 180.0, 240.0, 300.0], 20.0).to(self.device)
        looks = (self.render(views, size, shading=shading).colour for shading in (ALBEDO, LAMBERT))
        return contact_sheet([linear_to_srgb(colour) for colour in looks])

    @torch.no_grad()
    def render(self, views: Views, size: int, *, shading=ALBEDO, backdrop: Tensor | None = None) -> VolumeImages:
        """Return renders without randomness or gradients.

        Args:
            views: B views.
            size: pixels a side.
            shading: one for all views.
            backdrop: a linear colour [3]; None: the learned environment.
        """
        return render_field(
            self.field,
            self.background if backdrop is None else backdrop,
            self.occupancy.cells,
            views,
            size,
            size,
            shading=shading,
            sampling=Sampling(min(self.sampling.step_size, 2.0 / size)),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return parameters, Adam moments, grids, generators and counters; flat and ready for safetensors."""
        state = {"step_index": torch.tensor(self.step_index), "generator": self.generator.get_state()}
        for name, module in self._modules().items():
            state |= {f"{name}.{key}": value.detach().clone() for key, value in module.state_dict().items()}
        state |= self.adam.state_dict()
        return state | guidance_state(self.guidance)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state_dict; the stage must be freshly constructed with the same settings."""
        self.step_index = int(state["step_index"])
        self.generator.set_state(state["generator"].cpu())
        for name, module in self._modules().items():
            module.load_state_dict(under_prefix(state, name))
        self._set_progress(self.step_index / self.steps)
        self.adam.load_state_dict(state)
        load_guidance_state(self.guidance, state)

    def finish(self) -> Asset:
        """Return density and colours. Raises: UserError unless they are one finite object of sensible size."""
        self.field.set_progress(1.0)
        check_object(self.field.density, self.device)
        density = without_gradient(self.field.density)
        return Asset(density=density, albedo=self.field.albedo, field=self.field, background=self.background)

    def _set_progress(self, progress: float) -> None:
        """Coarse-to-fine training; an inherited field keeps all its levels on, or its detail would be gone at once."""
        self.field.set_progress(1.0 if self.edits else progress)

    def _modules(self) -> dict[str, nn.Module]:
        return {"field": self.field, "background": self.background, "occupancy": self.occupancy}
