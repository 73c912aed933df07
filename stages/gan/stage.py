"""The gan stage: shapes drawn by a class's generator, the one that a CLIP likes best, its colours moved to the words.

Gao et al. 2022, "GET3D" (arXiv 2209.11163). The first step draws latents and chooses, each later one is a step of Adam:
    z_geo, z_tex -> generator of the prompt's class -> meshes -> pictures -> CLIP -> the one nearest to the words
    w_tex of that one <- gradient through CLIP, pictures, texture field and texture planes
The mesh leaves with the texture field as its colours. Nearness is directional, as in the paper's text-guided synthesis
(sec. 4.3; StyleGAN-NADA, arXiv 2108.00946, eq. 3): with the pictures' and the words' embeddings I and T,
    cos(I - mean I of the drawn latents, T("a red mug") - T("a mug"))
which does not ask what makes every picture of one latent similar to any words.

Otherwise than there: the paper fine-tunes the generator under that loss; here it stays as it is, latents are drawn and
the nearest one taken, and the style of its texture is moved. Sizes are those of a CPU.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stages.cameras import Views, orbit_views
from stages.errors import UserError
from stages.gan.draw import draw
from stages.gan.generator import Planes
from stages.gan.model import Sizes, load_model, load_sizes
from stages.gan.tets import Surfaces, TetGrid, rescued
from stages.guidance.guide import EmbeddingGuide, Guide
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.mesh.clean import drop_floaters
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.networks import networks_folder, training_of
from stages.phases import phase
from stages.render.raster import render_mesh
from stages.render.shade import ALBEDO, LAMBERT, Shading
from stages.stage import Asset, contact_sheet, guidance_state, load_guidance_state

GREY = 0.5  # linear colour behind the pictures
ELEVATION = 20.0  # degrees, of all views
LOOKS = (30.0, 150.0, 270.0)  # azimuths that latents are judged from, degrees
SIDE = 64  # of those pictures, pixels
AT_ONCE = 16  # shapes drawn at once
BETAS = (0.9, 0.99)
KEEP = 0.02  # share of the largest part's area below which a part is dropped


class GanSettings(BaseModel):
    """Settings of the gan stage."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(16, ge=1, description="the choice among latents, and steps of the colours' optimisation")
    samples: int = Field(96, ge=1, le=4096, description="latents that are drawn and judged")
    lr: float = Field(0.005, ge=0, description="Adam's learning rate of the style of texture")
    views_per_step: int = Field(3, ge=1, le=3, description="views of one optimiser step")
    weights: str = Field("pocket", min_length=1, description="folder of the networks; pocket: the toolkit's own")
    resolution: int = Field(128, ge=16, le=1024, description="side of one preview picture in pixels")


class GanStage:
    """A Stage (stages/stage.py). Deterministic in its constructor arguments; resumes bitwise from state_dict().

    Args:
        settings: see there.
        guidance: a guide with a CLIP; None where the stage only loads and finishes.
        device: where the networks live.
        seed: of the latents and the views.
        previous: not looked at; the stage begins with nothing.
    Raises: UserError where there are no networks, or none of the prompt's class.
    Source: GET3D (arXiv 2209.11163).

    Example:
        >>> guidance = ClipGuidance(scorer, ClipGuidanceSettings(), ViewPrompts("a red mug"), torch.Generator())
        >>> stage = GanStage(GanSettings(), guidance, torch.device("cpu"), seed=0)
    """

    name = "gan"

    def __init__(
        self,
        settings: GanSettings,
        guidance: Guide | None,
        device: torch.device,
        seed: int,
        previous: Asset | None = None,
    ) -> None:
        self.settings, self.guidance, self.device = settings, guidance, torch.device(device)
        self.steps, self.step_index, self.times = settings.steps, 0, {}
        self.generator = torch.Generator().manual_seed(seed)
        model = load_model(networks_folder(settings.weights, "gan")).to(self.device)
        self.sizes = model.sizes
        self.number = 0 if guidance is None else self.sizes.classes.index(self._class(guidance))
        self.model = model
        self.grid = TetGrid(self.sizes.generator.cells, self.device)
        width = self.sizes.generator.width
        self.w_geo = torch.zeros(1, width, device=self.device)
        self.w_tex = torch.zeros(1, width, device=self.device)
        self.moments = [torch.zeros_like(self.w_tex) for _ in range(2)]
        self.mean = torch.zeros(len(LOOKS), 1, device=self.device)  # of the drawn latents' embeddings by look, [L, D]

    def _class(self, guidance: Guide) -> str:
        if not isinstance(guidance, EmbeddingGuide):
            raise UserError(
                "The gan stage cannot choose by the prompt",
                "its latents are compared with the words by a CLIP, and this prior is none",
                "leave prior.gan=clip:pocket",
            )
        return class_of(guidance.prompt, self.sizes)

    @property
    def network(self) -> torch.nn.Module:
        """The generator of the prompt's class."""
        return self.model.generators[self.sizes.classes[self.number]]

    def step(self) -> dict[str, float]:
        """Choose among latents, or move the style of texture; returns metrics."""
        metrics = self._choose() if self.step_index == 0 else self._move()
        self.step_index += 1
        return metrics

    @torch.no_grad()
    def _choose(self) -> dict[str, float]:
        """Take the styles of the latents whose pictures are nearest to the words."""
        z = torch.randn(2, self.settings.samples, self.sizes.generator.latent, generator=self.generator)
        w_geo, w_tex = self.network.map_geo(z[0].to(self.device)), self.network.map_tex(z[1].to(self.device))
        pairs = zip(w_geo.split(AT_ONCE), w_tex.split(AT_ONCE), strict=True)
        embeddings = torch.cat([self._embeddings(*pair) for pair in pairs], 1)  # [L, samples, D]
        self.mean = embeddings.mean(1)
        scores = self._nearness(embeddings, self.mean[:, None]).mean(0)
        best = int(scores.argmax())
        self.w_geo, self.w_tex = w_geo[best : best + 1].clone(), w_tex[best : best + 1].clone()
        return {"clip": 100 * float(scores[best])}

    def _embeddings(self, w_geo: Tensor, w_tex: Tensor) -> Tensor:
        """What the CLIP sees of shapes from every look, [L, B, D]."""
        with phase("generator", self.times):
            planes, surfaces = self._shapes(w_geo, w_tex)
        looks = []
        for azimuth in LOOKS:
            views = orbit_views([azimuth] * len(w_geo), ELEVATION).to(self.device)
            with phase("render", self.times):
                pictures = draw(self.network, planes, surfaces, views, SIDE, ALBEDO)
            with phase("guidance", self.times):
                looks.append(self.guidance.embed(pictures.over(pictures.colour.new_full((3,), GREY))))
        return torch.stack(looks)

    def _nearness(self, embeddings: Tensor, mean: Tensor) -> Tensor:
        """The directional cosine of each of some embeddings [..., D] with the words."""
        words = self.guidance.embed_words([self.guidance.prompt, f"a {self.sizes.classes[self.number]}"])
        return torch.cosine_similarity(embeddings - mean, words[0] - words[1], dim=-1)

    def _shapes(self, w_geo: Tensor, w_tex: Tensor) -> tuple[Planes, Surfaces]:
        planes = self.network.planes(w_geo, w_tex)
        sdf, offset = self.network.lattice_values(planes, self.grid)
        return planes, self.grid.surfaces(rescued(sdf, self.grid)[0], offset)

    def _move(self) -> dict[str, float]:
        """Take one step of Adam on the style of texture."""
        s, k = self.settings, self.step_index
        looks = [(k * s.views_per_step + n) % len(LOOKS) for n in range(s.views_per_step)]
        views = orbit_views([LOOKS[look] for look in looks], ELEVATION).to(self.device)
        w_tex = self.w_tex.clone().requires_grad_()
        with phase("generator", self.times):
            planes, surfaces = self._shapes(self.w_geo, w_tex)
        with phase("render", self.times):
            images = self._render(planes, surfaces, views, SIDE, ALBEDO)
        with phase("guidance", self.times):
            nearness = self._nearness(
                self.guidance.embed(images), torch.stack([self.mean[look] for look in looks])
            ).mean()
            (gradient,) = torch.autograd.grad(-nearness, w_tex)
        first, second = self.moments
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        step = (first / (1 - BETAS[0] ** k)) / ((second / (1 - BETAS[1] ** k)).sqrt() + 1e-8)
        self.w_tex = self.w_tex - s.lr * step
        return {"clip": 100 * float(nearness.detach())}

    def _render(self, planes: Planes, surfaces: Surfaces, views: Views, size: int, shading: Shading) -> Tensor:
        """Linear pictures [B, S, S, 3] of one shape from B views."""
        backdrop = torch.full((3,), GREY, device=self.device)
        albedo = self._albedo(planes)
        vertices = surfaces.vertices.detach()
        return render_mesh(
            vertices, surfaces.faces, albedo, views, size, size, shading=shading, backdrop=backdrop
        ).colour

    def _albedo(self, planes: Planes):
        """The texture field of one shape, linear colours [N, 3] at points [N, 3]."""

        def albedo(points: Tensor) -> Tensor:
            owner = torch.zeros(len(points), dtype=torch.long, device=points.device)
            return srgb_to_linear(self.network.colours(planes, points, owner))

        return albedo

    def headline(self, metrics: dict[str, float]) -> str:
        """Return how near the pictures are to the words, 100 times the cosine."""
        return f"CLIP {metrics['clip']:.1f}"

    @torch.no_grad()
    def preview(self) -> np.ndarray:
        """Return six views around the object at 20 deg elevation: albedo above, shaded below; uint8 sRGB."""
        views = orbit_views([0.0, 60.0, 120.0, 180.0, 240.0, 300.0], ELEVATION).to(self.device)
        shape = self._shapes(self.w_geo, self.w_tex)
        looks = (self._render(*shape, views, self.settings.resolution, shading) for shading in (ALBEDO, LAMBERT))
        return contact_sheet([linear_to_srgb(colour).clamp(0, 1) for colour in looks])

    def state_dict(self) -> dict[str, Tensor]:
        """Return class, styles, moments, generators and counters; flat and ready for safetensors."""
        state = {"w_geo": self.w_geo, "w_tex": self.w_tex, "first": self.moments[0], "second": self.moments[1]}
        state["mean"] = self.mean
        counters = {"step_index": torch.tensor(self.step_index), "class": torch.tensor(self.number)}
        counters["generator"] = self.generator.get_state()
        return counters | {name: value.clone() for name, value in state.items()} | guidance_state(self.guidance)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state_dict; the stage must be freshly constructed with the same settings."""
        self.step_index, self.number = int(state["step_index"]), int(state["class"])
        self.generator.set_state(state["generator"].cpu())
        self.w_geo, self.w_tex, self.mean = (state[name].to(self.device).clone() for name in ("w_geo", "w_tex", "mean"))
        self.moments = [state[name].to(self.device).clone() for name in ("first", "second")]
        load_guidance_state(self.guidance, state)

    @torch.no_grad()
    def finish(self) -> Asset:
        """Return the mesh, without floaters, and its colours. Raises: UserError where it bounds no body."""
        planes, surfaces = self._shapes(self.w_geo, self.w_tex)
        vertices, faces = surfaces.vertices.cpu().numpy(), surfaces.faces.cpu().numpy().astype(np.int32)
        field = self._albedo(planes)

        @torch.no_grad()
        def albedo(points: Tensor) -> Tensor:
            return field(points.to(self.device)).to(points.device)

        report = measure(mesh := drop_floaters(Mesh(vertices, faces), KEEP))
        if not report.solid:
            why = f"{report.boundary_edges} open edges, volume {report.volume:.2g}"
            raise UserError("The gan stage ended with a broken surface", why, "try another seed")
        mesh.colours = albedo(torch.from_numpy(mesh.vertices)).numpy()
        return Asset(mesh=mesh, albedo=albedo)


def check_class(settings: GanSettings, prompt: str) -> None:
    """Raise UserError, loading nothing, unless there is a generator of the class that a prompt names."""
    class_of(prompt, load_sizes(networks_folder(settings.weights, "gan")))


def class_of(prompt: str, sizes: Sizes) -> str:
    """Return the class of objects that a prompt names. Raises: UserError unless it is exactly one that there is."""
    tokens = re.findall(r"\w+", prompt.lower())
    named = dict.fromkeys(name for name in tokens if name in (*sizes.classes, *sizes.others))
    if len(named) == 1 and (name := next(iter(named))) in sizes.classes:
        return name
    kinds = ", ".join(sizes.classes)
    why = f"it names {' and '.join(named) or 'none of them'}, and there are generators of {kinds} alone"
    fix = f"name one of {kinds}, or train others: {training_of('gan')} --classes NAME"
    raise UserError(f"The gan stage cannot draw {prompt!r}", why, fix)
