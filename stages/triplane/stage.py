"""The triplane stage: a tri-plane drawn by diffusion from the words, as Rodin draws heads; a draft in seconds.

Wang et al. 2022 (arXiv 2212.06135). One step of the stage is one step of a sampler:
    words -> CLIP's text side -> base diffusion of 32^2 planes -> upsampling diffusion to 64^2 -> shared decoder
The decoded field is drawn by the toolkit's volume renderer and leaves as density and colour, of which the next stage,
or the export, makes a surface. Nothing is optimised and no prior asked; the CLIP only reads the prompt.

Otherwise than there: planes are fitted to occupancy and colours at points, not to renderings; the convolutional
refinement of rendered pictures is left out, since what is wanted is a mesh; sizes are those of a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from stages.cameras import Views, orbit_views
from stages.errors import UserError
from stages.fields.check import check_draft
from stages.guidance.guide import Guide, ReadingGuide
from stages.kernels.srgb import linear_to_srgb
from stages.networks import networks_folder
from stages.phases import phase
from stages.render.shade import ALBEDO, LAMBERT, Shading
from stages.render.volume import VolumeImages
from stages.stage import Asset, contact_sheet, guidance_state, load_guidance_state
from stages.triplane.diffusion import cosine, next_noise, sigmoid, times
from stages.triplane.draw import draw, occupied
from stages.triplane.field import TriplaneField
from stages.triplane.model import Condition, load_model

GREY = 0.5  # linear colour behind the previews


class TriplaneSettings(BaseModel):
    """Settings of the triplane stage."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(60, ge=2, le=1000, description="denoising steps in all; Rodin takes 100 for the base")
    upsampling: int = Field(10, ge=0, description="of them, the upsampler's; 0 leaves the low planes as they are")
    scale: float = Field(1.5, ge=0, description="of classifier-free guidance; 1 for none")
    eta: float = Field(0.5, ge=0, le=1, description="share of fresh noise in a step: 0 DDIM, 1 DDPM")
    weights: str = Field("pocket", min_length=1, description="folder of the networks; pocket: the toolkit's own")
    views_per_step: int = Field(1, ge=1, description="not used: no pictures are made")
    resolution: int = Field(128, ge=16, le=1024, description="side of one preview picture in pixels")

    @model_validator(mode="after")
    def _some_for_the_base(self) -> TriplaneSettings:
        if self.upsampling >= self.steps:
            raise ValueError(f"upsampling: wanted fewer than the {self.steps} steps in all, got {self.upsampling}")
        return self


class TriplaneStage:
    """A Stage (stages/stage.py). Deterministic in its constructor arguments; resumes bitwise from state_dict().

    Args:
        settings: see there.
        guidance: a guide whose CLIP reads the prompt; None where the stage only loads and finishes.
        device: where the networks live.
        seed: of the noise.
        previous: not looked at; the stage begins with nothing.
    Raises: UserError where there are no networks, or the CLIP is another than they were trained with.
    Source: Rodin (arXiv 2212.06135).

    Example:
        >>> guidance = ClipGuidance(scorer, ClipGuidanceSettings(), ViewPrompts("a red mug"), torch.Generator())
        >>> stage = TriplaneStage(TriplaneSettings(), guidance, torch.device("cpu"), seed=0)
    """

    name = "triplane"

    def __init__(
        self,
        settings: TriplaneSettings,
        guidance: Guide | None,
        device: torch.device,
        seed: int,
        previous: Asset | None = None,
    ) -> None:
        self.settings, self.guidance, self.device = settings, guidance, torch.device(device)
        self.steps, self.step_index, self.times = settings.steps, 0, {}
        self.generator = torch.Generator().manual_seed(seed)
        self.model = load_model(networks_folder(settings.weights, "triplane")).to(self.device)
        self.condition = None if guidance is None else self._read(guidance).to(self.device)
        self.z = self._noise(self.model.sizes.low)
        self.low = torch.zeros_like(self.z)  # the base's clean planes as they now look
        self.x0 = self.low  # the clean planes at their finest

    def _read(self, guidance: Guide) -> Condition:
        """The prompt as the CLIP reads it."""
        shape = self.model.sizes.base
        if not isinstance(guidance, ReadingGuide):
            raise UserError(
                "The triplane stage cannot read the prompt",
                "its networks are told what a CLIP makes of the words, and this prior is none",
                "leave prior.triplane=clip:pocket",
            )
        vector, words, mask = guidance.read()
        if (vector.shape[-1], words.shape[-1]) != (shape.condition, shape.words):
            raise UserError(
                "The triplane stage was not trained with this CLIP",
                f"the CLIP's embeddings have {vector.shape[-1]} numbers and its words {words.shape[-1]}, "
                f"the networks read {shape.condition} and {shape.words}",
                "leave prior.triplane=clip:pocket, or set triplane.weights to networks of that CLIP",
            )
        return Condition(vector, words, mask)

    def _noise(self, side: int) -> Tensor:
        shape = (1, self.model.sizes.channels, side, 3 * side)
        return torch.randn(shape, generator=self.generator).to(self.device)

    @property
    def _base_steps(self) -> int:
        return self.steps - self.settings.upsampling

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        """Take one denoising step, of the base or the upsampler; returns metrics."""
        s, before = self.settings, self.x0
        if self.step_index < self._base_steps:
            k, schedule = self.step_index, cosine
            ladder = times(self._base_steps)
            with phase("networks", self.times):
                self.x0 = self.low = self.model.base_x0(self.z, self._time(ladder[k]), self.condition, s.scale)
        else:
            k, schedule = self.step_index - self._base_steps, sigmoid
            ladder = times(s.upsampling)
            if k == 0:
                self.z = self._noise(self.model.sizes.high)
            with phase("networks", self.times):
                self.x0 = self.model.up_x0(self.z, self._time(ladder[k]), self.low, self.condition)
        self.z = next_noise(self.z, self.x0, ladder[k], ladder[k + 1], schedule, s.eta, self.generator)
        self.step_index += 1
        change = (self.x0 - before).square().mean().sqrt() if before.shape == self.x0.shape else self.x0.new_zeros(())
        noise = float((1 - schedule(torch.tensor(ladder[k]))).sqrt())
        return {"noise": noise, "moved": float(change), "spread": float(self.x0.std())}

    def _time(self, t: float) -> Tensor:
        return torch.full((1,), t, device=self.device)

    def headline(self, metrics: dict[str, float]) -> str:
        """Return how much of the planes is noise, and how far the clean ones moved in this step."""
        return f"noise {100 * metrics['noise']:.0f} %, moved {metrics['moved']:.3f}"

    def field(self) -> TriplaneField:
        """Return the field of the clean planes as they now look."""
        return TriplaneField(self.model.planes(self.x0)[0], self.model.decoder)

    @torch.no_grad()
    def preview(self) -> np.ndarray:
        """Return six views around the object at 20 deg elevation: albedo above, shaded below; uint8 sRGB."""
        views = orbit_views([0.0, 60.0, 120.0, 180.0, 240.0, 300.0], 20.0).to(self.device)
        field, size, grey = self.field(), self.settings.resolution, torch.full((3,), GREY, device=self.device)
        cells = occupied(field, self.device)
        looks = (draw(field, views, size, grey, shading=shading, cells=cells).colour for shading in (ALBEDO, LAMBERT))
        return contact_sheet([linear_to_srgb(colour).clamp(0, 1) for colour in looks])

    @torch.no_grad()
    def render(
        self, views: Views, size: int, *, shading: Shading = ALBEDO, backdrop: Tensor | None = None
    ) -> VolumeImages:
        """Return renders of the clean planes as they now look.

        Args:
            views: B views.
            size: pixels a side.
            shading: one for all views.
            backdrop: a linear colour [3]; None: mid grey.
        """
        field = self.field()
        behind = torch.full((3,), GREY, device=self.device) if backdrop is None else backdrop
        return draw(field, views.to(self.device), size, behind, shading=shading)

    def state_dict(self) -> dict[str, Tensor]:
        """Return noisy and clean planes, generators and counters; flat and ready for safetensors."""
        planes = {"z": self.z.clone(), "low": self.low.clone(), "x0": self.x0.clone()}
        counters = {"step_index": torch.tensor(self.step_index), "generator": self.generator.get_state()}
        return counters | planes | guidance_state(self.guidance)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state_dict; the stage must be freshly constructed with the same settings."""
        self.step_index = int(state["step_index"])
        self.generator.set_state(state["generator"].cpu())
        self.z, self.low, self.x0 = (state[name].to(self.device) for name in ("z", "low", "x0"))
        load_guidance_state(self.guidance, state)

    def finish(self) -> Asset:
        """Return density and colours. Raises: UserError unless they are one finite object of sensible size."""
        field = self.field()
        check_draft(self.name, field.density, self.device)

        @torch.no_grad()
        def density(points: Tensor) -> Tensor:
            return field.density(points.to(self.device)).to(points.device)

        @torch.no_grad()
        def albedo(points: Tensor) -> Tensor:
            return field.albedo(points.to(self.device)).to(points.device)

        return Asset(density=density, albedo=albedo)
