"""The points stage: a picture from the words, a coloured point cloud from the picture, a surface around the cloud.

Nichol et al. 2022 (arXiv 2212.08751). The first step of the stage draws the picture, each later one is a step of a
sampler:
    words -> prior -> picture -> CLIP's grid, beside its embedding of the words -> base diffusion of 1,024 points
    -> upsampling diffusion to 4,096 -> signed distance on a grid -> density; colours of the nearest points
Nothing is optimised. A run's `--image` enters at the picture, `points.condition` leaves out the picture or the words.

Otherwise than there: the networks predict v (Salimans & Ho 2022, arXiv 2202.00512), not eps, whose loss hardly hears of
large sigma, where the words decide; one network reads grid and words, either of which may be missing, where Point-E has
one for each; the upsampler draws its points in three groups of 1,024, each beside the low cloud, and is not guided;
sizes are those of a CPU.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from stages.cameras import orbit_views
from stages.errors import UserError
from stages.fields.check import check_draft
from stages.guidance.clip import ClipScorer
from stages.guidance.guide import Guide, PicturingGuide, PromptedGuide
from stages.mesh.cloud import Cloud
from stages.networks import networks_folder
from stages.phases import phase
from stages.points.cloud import REACH, NearestColours, cloud_of
from stages.points.diffusion import MOST, churned, heun, ladder
from stages.points.draw import draw_cloud
from stages.points.model import HIGH, LOW, Condition, load_model
from stages.points.surface import density_of, distance_grid
from stages.stage import Asset, contact_sheet, guidance_state, load_guidance_state

VIEW = (20.0, 20.0)  # azimuth and elevation of the picture, degrees
SIDE = 64  # of a picture that is given, pixels
CHURN = 3.0  # fresh noise of the base's sampler, in all its steps together


class PointSettings(BaseModel):
    """Settings of the points stage."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(32, ge=3, le=1000, description="the picture, and denoising steps; Point-E takes 64 for each net")
    upsampling: int = Field(10, ge=0, description="of them, the upsampler's; 0 leaves the 1,024 points as they are")
    condition: Literal["both", "picture", "words"] = Field("both", description="what the networks are told")
    scale: float = Field(3.0, ge=0, description="of the base's classifier-free guidance; 1 for none")
    picture_steps: int = Field(25, ge=1, le=1000, description="denoising steps of the picture")
    picture_scale: float = Field(1.0, ge=0, description="of the picture's guidance; 1 for none")
    grid: int = Field(64, ge=16, le=256, multiple_of=2, description="points a side of the grid of signed distances")
    weights: str = Field("pocket", min_length=1, description="folder of the networks; pocket: the toolkit's own")
    clip: str = Field("pocket", min_length=1, description="folder of the CLIP that they were trained with")
    views_per_step: int = Field(1, ge=1, description="not used: nothing is rendered")
    resolution: int = Field(128, ge=16, le=1024, description="side of one preview picture in pixels")

    @model_validator(mode="after")
    def _some_for_the_base(self) -> PointSettings:
        if self.upsampling >= self.steps - 1:
            raise ValueError(f"upsampling: wanted fewer than steps - 1 = {self.steps - 1}, got {self.upsampling}")
        return self


class PointStage:
    """A Stage (stages/stage.py). Deterministic in its constructor arguments; resumes bitwise from state_dict().

    Args:
        settings: see there.
        guidance: a guide that knows the prompt, and whose prior can draw it; None where the stage only loads and
            finishes.
        device: where the networks live.
        seed: of the noise.
        previous: of it the picture of an object, which takes the place of the one that the prior draws.
    Raises: UserError where there are no networks, or the CLIP is another than they were trained with.
    Source: Point-E (arXiv 2212.08751).
    """

    name = "points"

    def __init__(
        self,
        settings: PointSettings,
        guidance: Guide | None,
        device: torch.device,
        seed: int,
        previous: Asset | None = None,
    ) -> None:
        self.settings, self.guidance, self.device = settings, guidance, torch.device(device)
        self.steps, self.step_index, self.times = settings.steps, 0, {}
        self.generator = torch.Generator().manual_seed(seed)
        self.given = None if previous is None else previous.picture
        self.model = load_model(networks_folder(settings.weights, "points")).to(self.device)
        self.scorer = None if guidance is None else self._scorer()
        shape = self.model.sizes.base
        nothing = (torch.zeros(1, *part, device=self.device) for part in ((shape.vector,), (1, shape.grid)))
        self.condition = Condition(*nothing)
        self.picture = torch.full((1, 64, 64, 3), 0.5)  # sRGB
        self.x = torch.zeros(1, LOW, 6, device=self.device)  # the noisy points that the sampler moves
        self.low = torch.zeros_like(self.x)  # the base's clean points as they now look
        self.high = torch.zeros(1, 0, 6, device=self.device)  # the upsampler's

    def _scorer(self) -> ClipScorer:
        s, shape = self.settings, self.model.sizes.base
        if not isinstance(self.guidance, PromptedGuide):
            raise UserError("The points stage cannot read the prompt", "its guide has no words", "set another prior")
        if s.condition != "words" and self.given is None and not isinstance(self.guidance, PicturingGuide):
            raise UserError(
                "The points stage has nothing to draw the picture with",
                "its prior only compares pictures with words",
                "leave prior.points=pocket, give --image, or set points.condition=words",
            )
        scorer = ClipScorer(networks_folder(s.clip, "clip"), self.device)
        config = scorer.model.config
        theirs = config.projection_dim, config.vision_config.hidden_size
        if theirs != (shape.vector, shape.grid):
            raise UserError(
                "The points stage was not trained with this CLIP",
                f"the CLIP's embeddings and tokens have {theirs[0]} and {theirs[1]} numbers, "
                f"the networks read {shape.vector} and {shape.grid}",
                "leave points.clip=pocket, or set points.weights to networks of that CLIP",
            )
        return scorer

    @property
    def _base_steps(self) -> int:
        return self.steps - 1 - self.settings.upsampling

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        """Draw the picture, or take one step of a sampler; returns metrics."""
        k, base = self.step_index - 1, self._base_steps
        if k < 0:
            with phase("picture", self.times):
                self._look()
            noise = MOST["base"]
        elif k < base:
            noise = self._denoise("base", k, base, self.settings.scale, CHURN / base)
        else:
            noise = self._denoise("up", k - base, self.settings.upsampling, 1.0, 0.0)
        self.step_index += 1
        cloud = torch.cat([self.low, self.high], 1)[0]
        return {"noise": noise, "spread": float(cloud[:, :3].std()) * REACH, "points": float(len(cloud))}

    def _denoise(self, name: str, k: int, steps: int, scale: float, churn: float) -> float:
        """One step of a network's sampler; returns the noise level that it began at."""
        levels = ladder(steps, MOST[name])
        if k == 0:
            groups = 1 if name == "base" else HIGH // LOW - 1
            self.x = levels[0] * torch.randn((groups, LOW, 6), generator=self.generator).to(self.device)
        groups = len(self.x)
        told, low = self.condition.repeat(groups), self.low.expand(groups, -1, -1) if name == "up" else None
        with phase("networks", self.times):
            x, sigma = churned(self.x, levels[k], churn, self.generator)
            self.x, x0 = heun(x, sigma, levels[k + 1], lambda x, sigma: self.model.x0(name, x, sigma, told, low, scale))
        if name == "base":
            self.low = x0
        else:
            self.high = x0.reshape(1, -1, 6)
        return levels[k]

    def _look(self) -> None:
        """Read the prompt, and draw or read the picture."""
        s, shape = self.settings, self.model.sizes.base
        vector = torch.zeros(1, shape.vector, device=self.device)
        grid = torch.zeros(1, 1, shape.grid, device=self.device)
        if s.condition != "picture":
            vector = self.scorer.embed_texts([self.guidance.prompt]) * shape.vector**0.5
        if s.condition != "words":
            self.picture = self._draw() if self.given is None else self.given.colour_at(SIDE)
            grid = self.scorer.grid(self.picture)
        self.condition = Condition(vector, grid)

    def _draw(self) -> Tensor:
        s, views = self.settings, orbit_views([VIEW[0]], VIEW[1]).to(self.device)
        return self.guidance.picture(
            views, steps=s.picture_steps, scale=s.picture_scale, generator=self.generator
        ).cpu()

    def headline(self, metrics: dict[str, float]) -> str:
        """Return how noisy the points still are, and how many there are."""
        return f"noise {metrics['noise']:.3g}, {metrics['points']:.0f} points"

    def cloud(self) -> Cloud:
        """Return the cloud as it now looks."""
        return cloud_of(torch.cat([self.low, self.high], 1)[0])

    @torch.no_grad()
    def preview(self) -> np.ndarray:
        """Return the picture and the cloud from five sides at 20 deg elevation; uint8 sRGB."""
        size = self.settings.resolution
        views = orbit_views([0.0, 72.0, 144.0, 216.0, 288.0], 20.0).to(self.device)
        picture = torch.nn.functional.interpolate(self.picture.permute(0, 3, 1, 2), (size, size)).permute(0, 2, 3, 1)
        return contact_sheet([torch.cat([picture, draw_cloud(self.cloud(), views, size).cpu()])])

    def state_dict(self) -> dict[str, Tensor]:
        """Return points, picture, what the networks are told, generators and counters; ready for safetensors."""
        state = {"x": self.x, "low": self.low, "high": self.high, "picture": self.picture}
        state |= {"vector": self.condition.vector, "grid": self.condition.grid}
        counters = {"step_index": torch.tensor(self.step_index), "generator": self.generator.get_state()}
        return counters | {name: value.clone() for name, value in state.items()} | guidance_state(self.guidance)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state_dict; the stage must be freshly constructed with the same settings."""
        self.step_index = int(state["step_index"])
        self.generator.set_state(state["generator"].cpu())
        self.x, self.low, self.high = (state[name].to(self.device) for name in ("x", "low", "high"))
        self.picture = state["picture"].cpu()
        self.condition = Condition(state["vector"].to(self.device), state["grid"].to(self.device))
        load_guidance_state(self.guidance, state)

    @torch.no_grad()
    def finish(self) -> Asset:
        """Return density, colours and the cloud. Raises: UserError unless they are one object of sensible size."""
        cloud = self.cloud()
        with phase("surface", self.times):
            grid = distance_grid(self.model.sdf, cloud.points.float(), self.settings.grid)

        def density(points: Tensor) -> Tensor:
            return density_of(grid.to(points), points)

        check_draft(self.name, density, self.device)
        return Asset(density=density, albedo=NearestColours(cloud), cloud=cloud)
