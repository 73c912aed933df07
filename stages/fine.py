"""The fine stage: score distillation of a latent prior at 512x512 into a DMTet mesh with a colour field (Magic3D).

One step, top to bottom in :meth:`FineStage.step`:
    surface                    <- marching tetrahedra of the signed distances, closed and oriented
    views, shading, backdrop   <- random
    images                     <- mesh render, colour from the field that the coarse stage trained
    loss = guidance(images) + normal consistency + Laplacian
    Adam on signed distances (their gradient smoothed over the band: large steps, then fine ones), offsets and colour,
    each with its own learning rate; then the band follows the surface

Loss convention: the guidance loss is SUMMED over the prior's pixels and channels and averaged over the views (16,384
terms at 64x64x4). The smoothness terms are means over the mesh; their weights are tuned to that sum (threestudio: 1e4).
"""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import Parameter

from stages.cameras import CameraSettings, Views, orbit_views, sample_views
from stages.errors import UserError
from stages.fields.background import BackgroundSettings, random_background
from stages.fields.colour_fit import FitSettings, fit_albedo
from stages.fields.hashfield import DetailSettings, FieldSettings, HashField, without_gradient
from stages.geometry import DMTetGeometry, Geometry, LockedGeometry, colours_to_learn
from stages.guidance.guide import Guide, Metric, check_predictions, metric
from stages.kernels.srgb import linear_to_srgb
from stages.likeness import liken
from stages.mesh.orient import creased
from stages.mesh.place import SPECK
from stages.mesh.tets.dmtet import DMTet, Surface, from_function
from stages.mesh.tets.initialise import InitialiseSettings, dmtet_from_density
from stages.mesh.tets.solidify import SolidifySettings, dmtet_from_mesh
from stages.mesh.tets.tetrahedra import SAFE_MOVE, Lattice
from stages.optimise import GroupedAdam, check_accumulate, under_prefix
from stages.parallel import StepParts, undone_if_lost
from stages.phases import phase
from stages.picture import BEHIND, RENDERED
from stages.ramp import Ramp
from stages.render.raster import MeshImages, render_mesh
from stages.render.shade import ALBEDO, LAMBERT, Shading, ShadingSettings, sample_shading
from stages.stage import Asset, add_metrics, contact_sheet, guidance_state, load_guidance_state


class FineSettings(BaseModel):
    """Settings of the fine stage without its guidance."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(300, ge=1, description="optimisation steps")
    resolution: int = Field(512, ge=16, le=2048, description="side of a training render in pixels")
    views_per_step: int = Field(1, ge=1, description="views of one optimiser step")
    accumulate: int = Field(1, ge=1, description="parts that a step's views are rendered in, to bound memory")

    geometry: Literal["dmtet", "locked"] = Field("dmtet", description="optimise the surface, or its colour alone")
    tets: int = Field(64, ge=8, le=512, description="cells of the tetrahedral lattice along a side of the box")
    deformation: float = Field(0.24, ge=0, lt=SAFE_MOVE, description="largest move of a lattice vertex in cells")
    initialise: InitialiseSettings = Field(default_factory=InitialiseSettings, description="from density to surface")
    sphere: float = Field(0.6, gt=0.05, lt=0.95, description="radius of the start where there is nothing to refine")
    solidify: SolidifySettings = Field(default_factory=SolidifySettings, description="from a given mesh to surface")
    fit: FitSettings = Field(default_factory=FitSettings, description="from a given mesh's colours to the colour field")

    cameras: CameraSettings = Field(
        default_factory=lambda: CameraSettings(fov_deg=(28.0, 34.0)), description="distribution of views and lights"
    )
    shading: ShadingSettings = Field(
        default_factory=lambda: ShadingSettings(albedo_until=0, diffuse_probability=0.5, textureless_probability=0.3),
        description="mix of shadings; shaded from the start",
    )
    background: BackgroundSettings = Field(
        default_factory=lambda: BackgroundSettings(random_probability=1.0), description="flat greys behind the object"
    )
    field: FieldSettings = Field(default_factory=FieldSettings, description="colour field where there is no coarse one")
    detail: DetailSettings = Field(default_factory=DetailSettings, description="finer levels of the colour field")
    colour_moves_surface: bool = Field(False, description="let the colour field's slope move the surface; slower")
    normal_consistency: float = Field(1000.0, ge=0, description="weight of mean 1 - cos across edges")
    laplacian: float = Field(1000.0, ge=0, description="weight of the mean squared umbrella vector, in edge lengths")

    spread: Ramp = Field(
        Ramp(0.25, 0.05), ge=0, description="length over which a gradient moves the surface, world units"
    )
    lr_sdf: Ramp = Field(
        Ramp(5e-3, 5e-4, shape="cosine"), gt=0, description="Adam learning rate of the signed distances, world units"
    )
    lr_offset: Ramp = Field(
        Ramp(1e-2, 1e-3, shape="cosine"),
        gt=0,
        description="Adam learning rate of the offsets, in shares of their bound",
    )
    lr_texture: Ramp = Field(
        Ramp(1e-2, 1e-3, shape="cosine"), gt=0, description="Adam learning rate of the colour field"
    )
    betas: tuple[float, float] = Field((0.9, 0.99), description="Adam's decay rates")
    max_skipped: int = Field(20, ge=1, description="non-finite gradients in a row that end the stage")

    keep: float = Field(0.05, ge=0, le=1, description="at the end, drop parts below this share of the largest's area")
    preview_size: int = Field(256, ge=16, le=1024, description="side of one preview picture in pixels")


class FineStage:
    """A Stage (stages/stage.py). Deterministic in its constructor arguments; resumes bitwise from state_dict().

    Args:
        settings: everything but the guidance.
        guidance: see stages/guidance/guidance.py; None where the stage only loads and finishes.
        device: where surface, field and renders live.
        seed: of all that is drawn.
        previous: the coarse stage's asset: its density becomes the surface, its field the colour. Or a user's mesh,
            whose colours the field learns first. None starts from a sphere of no particular colour.
    Raises: UserError for views that cannot be rendered in equal parts.
    Source: Magic3D (arXiv 2211.10440) sec. 4.2, DMTet (arXiv 2111.04276).

    Example:
        >>> stage = FineStage(FineSettings(steps=80), guidance, torch.device("cpu"), seed=0, previous=asset)
        >>> while stage.step_index < stage.steps:
        ...     metrics = stage.step()
        >>> mesh = stage.finish().mesh
    """

    name = "fine"

    def __init__(
        self,
        settings: FineSettings,
        guidance: Guide | None,
        device: torch.device,
        seed: int,
        previous: Asset | None = None,
    ) -> None:
        check_accumulate("fine", settings.views_per_step, settings.accumulate)
        self.settings, self.guidance, self.device = settings, guidance, torch.device(device)
        self.previous = previous or Asset()
        liken(guidance, self.previous.picture, self.device)
        self.steps, self.step_index, self.times = settings.steps, 0, {}
        self.generator = torch.Generator().manual_seed(seed)
        self.field = self._inherited_field()
        self.start: dict[str, float] = {}  # how the first surface was made, for the first step's metrics

    def _inherited_field(self) -> HashField:
        s, coarse = self.settings, self.previous.field
        field = HashField(s.field, self.generator) if coarse is None else copy.deepcopy(coarse)
        field = field.to(self.device)
        field.set_progress(1.0)
        if s.detail.levels and field.detail is None and s.detail.finest > field.spec.finest:
            field.add_detail(self.generator, s.detail.levels, s.detail.log2_table, s.detail.finest)
        field.requires_grad_(False)
        for parameter in field.albedo_parameters():
            parameter.requires_grad_(True)
        return field

    @cached_property
    def geometry(self) -> Geometry:
        """The shape. The first one is made when it is first asked for, and the field learns a user's colours with it.

        A resumed stage loads both instead, so nothing is converted or learnt again.
        """
        with phase("initialise", self.times):
            geometry = self._first_geometry()
            samples = colours_to_learn(self.previous, geometry, self.generator)
            if samples is not None:
                error = fit_albedo(self.field, samples, self.settings.fit, self.device)
                self.start["start_colour_error"] = error
        return geometry

    @cached_property
    def adam(self) -> GroupedAdam:
        """The optimiser of field and geometry."""
        return self._optimiser(self.geometry)

    def _first_geometry(self) -> Geometry:
        mesh = self.previous.mesh
        if self.settings.geometry == "dmtet":
            return self._moving(self._first_dmtet())
        if self.previous.density is None and mesh is not None:
            creased_mesh = creased(mesh)  # shaded without a file's seams and flipped edges
            triangles = torch.from_numpy(creased_mesh.vertices), torch.from_numpy(creased_mesh.faces)
            return LockedGeometry(*triangles, self.device, source=mesh)
        surface = self._first_dmtet().surface()
        return LockedGeometry(surface.vertices, surface.faces, self.device)

    def _first_dmtet(self) -> DMTet:
        """The surface of the coarse density, of a user's mesh, or of a sphere."""
        s, previous, lattice = self.settings, self.previous, Lattice(self.settings.tets)
        options = {"deformation": s.deformation, "device": self.device}
        facts: dict[str, float] = {}
        if previous.density is not None:
            dmtet, level = dmtet_from_density(previous.density, lattice, s.initialise, **options)
            facts = asdict(level)
        elif previous.mesh is not None:
            dmtet, facts = dmtet_from_mesh(previous.mesh, lattice, s.solidify, **options)
        else:
            dmtet = from_function(lattice, lambda p: p.norm(dim=-1) - s.sphere, **options)
        self.start = {f"start_{name}": float(value) for name, value in facts.items()}
        return dmtet

    def _moving(self, dmtet: DMTet) -> DMTetGeometry:
        s = self.settings
        return DMTetGeometry(
            dmtet,
            lr_sdf=s.lr_sdf,
            lr_offset=s.lr_offset,
            spread=s.spread,
            normal_consistency=s.normal_consistency,
            laplacian=s.laplacian,
            keep=s.keep if self.previous.mesh is None else min(s.keep, SPECK),  # a user's small parts are no floaters
        )

    def _groups(self, geometry: Geometry) -> list[tuple[dict[str, Parameter], Ramp]]:
        """Return the optimised parameters in groups, each with its learning rate."""
        colour = {f"field.{name}": p for name, p in self.field.named_parameters() if p.requires_grad}
        return [(colour, self.settings.lr_texture), *geometry.parameters()]

    def _optimiser(self, geometry: Geometry) -> GroupedAdam:
        return GroupedAdam(
            [parameters for parameters, _ in self._groups(geometry)],
            betas=self.settings.betas,
            eps=1e-15,
            patience=self.settings.max_skipped,
            stage="fine",
            advice="lower fine.lr_sdf or the guidance scale; for a half-precision prior set its dtype to float32",
        )

    def surface(self) -> Surface:
        """Return the present surface, differentiable in the geometry's parameters."""
        return self.geometry.surface()

    def step(self) -> dict[str, float]:
        """Take one optimisation step over `views_per_step` views; returns metrics. Raises: RankLost (parallel.py)."""
        with undone_if_lost([self.generator, getattr(self.guidance, "generator", None)]):
            return self._step()

    def _step(self) -> dict[str, float]:
        s, progress, times, geometry = self.settings, self.step_index / self.steps, self.times, self.geometry
        with phase("surface", times):
            surface = geometry.surface()
            leaf = surface.vertices.detach().requires_grad_(geometry.moves)
        with phase("views", times):
            views = sample_views(s.cameras, s.views_per_step, self.generator).to(self.device)
            shading = sample_shading(s.shading, progress, self.generator)
            # a shape that stays learns nothing from a view without colours
            shading = replace(shading, textureless=shading.textureless and geometry.moves)
            backdrop = self._backdrop()

        totals: dict[str, Metric] = {}
        parts = StepParts(s.views_per_step, s.accumulate)
        for part in parts:
            if not part.mine:
                continue
            part_views, part_backdrop = views[part.slice], backdrop[part.slice]
            with phase("render", times):
                images = self._render(leaf, surface.faces, part_views, s.resolution, shading, part_backdrop)
            with phase("guidance", times):
                output = self.guidance(
                    images.colour,
                    part_views,
                    progress,
                    shading.textureless,
                    backdrop=part_backdrop,
                    shading=shading,
                    part=part,
                )
            with phase("backward", times):
                if output.loss.requires_grad:  # a view that misses a locked mesh has nothing to learn from
                    (output.loss / parts.count).backward()
            cover = {"cover": metric(images.mask.mean())}
            add_metrics(totals, output.metrics | cover, 1 / parts.count)
        if self.previous.picture is not None:
            with phase("picture", times):
                self._hold_picture(leaf, surface.faces, totals, 1 / parts.copies)
        with phase("regularisers", times):
            parts.join([leaf, *(p for p in self.field.parameters() if p.requires_grad)], totals)
            totals, self.start = self.start | totals, {}
            totals |= _size(leaf, surface.faces) | geometry.regularise(leaf, surface, output.strength)
        with phase("backward", times):
            geometry.backward(surface, leaf.grad, progress)
        with phase("optimiser", times):
            totals["grad_norm"] = self._update(progress, totals)
        check_predictions(self.guidance, totals)
        self.step_index += 1
        return totals

    def _hold_picture(self, vertices: Tensor, faces: Tensor, totals: dict[str, Metric], share: float) -> None:
        """Add a share of the gradient of the picture's loss in its view, and of its metrics to `totals`."""
        picture, grey = self.previous.picture, torch.full((1, 1, 1, 3), BEHIND, device=self.device)
        side = min(self.settings.resolution, RENDERED)
        images = self._render(vertices, faces, picture.view.to(self.device), side, ALBEDO, grey)
        loss, metrics = picture.loss(images.colour, images.mask, images.depth)
        if loss.requires_grad:
            (share * loss).backward()
        add_metrics(totals, metrics, share)

    def _backdrop(self) -> Tensor:
        """Draw a flat colour for each of this step's views; linear [B, S, S, 3]."""
        s = self.settings
        colours = random_background(s.background, s.views_per_step, self.generator)
        colours = torch.full((s.views_per_step, 1, 1, 3), 0.5) if colours is None else colours
        return colours.to(self.device).expand(-1, s.resolution, s.resolution, 3)

    def _render(
        self, vertices: Tensor, faces: Tensor, views: Views, size: int, shading: Shading, backdrop: Tensor
    ) -> MeshImages:
        def albedo(points: Tensor) -> Tensor:
            return self.field.albedo(points if self.settings.colour_moves_surface else points.detach())

        backdrop = backdrop.expand(len(views), size, size, 3)
        return render_mesh(vertices, faces, albedo, views, size, size, shading=shading, backdrop=backdrop)

    def _update(self, progress: float, metrics: dict[str, Metric]) -> float:
        """Take the optimiser step and return the gradient's norm; see GroupedAdam.step."""
        rates = [rate.at(progress) for _, rate in self._groups(self.geometry)]
        norm = self.adam.step(rates, self.step_index, metrics)
        self.geometry.after_step(self.adam)
        return norm

    def headline(self, metrics: dict[str, float]) -> str:
        """Return the size of the mesh, and how near the renders are to what the prior would draw."""
        agreement = f", agreement {metrics['agreement_db']:.1f} dB" if "agreement_db" in metrics else ""
        return f"{metrics['faces'] / 1000:.0f}k faces{agreement}"

    @torch.no_grad()
    def preview(self) -> np.ndarray:
        """Return four views at 20 deg elevation: albedo, shaded and normals in three rows; uint8 sRGB."""
        size = self.settings.preview_size
        views = orbit_views([0.0, 90.0, 180.0, 270.0], 20.0).to(self.device)
        surface, grey = self.surface(), torch.full((4, 1, 1, 3), 0.5, device=self.device)
        albedo, shaded = (
            self._render(surface.vertices, surface.faces, views, size, shading, grey) for shading in (ALBEDO, LAMBERT)
        )
        return contact_sheet([linear_to_srgb(albedo.colour), linear_to_srgb(shaded.colour), albedo.normal_picture])

    @torch.no_grad()
    def render(self, views: Views, size: int, *, shading=ALBEDO, backdrop: Tensor | None = None) -> MeshImages:
        """Return renders without randomness or gradients.

        Args:
            views: B views.
            size: pixels a side.
            shading: one for all views.
            backdrop: a linear colour [3]; None: mid grey.
        """
        surface = self.surface()
        grey = torch.full((3,), 0.5) if backdrop is None else backdrop
        return self._render(surface.vertices, surface.faces, views, size, shading, grey.to(self.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Return colour field, surface, Adam moments, generators and counters; flat and ready for safetensors."""
        state = {"step_index": torch.tensor(self.step_index), "generator": self.generator.get_state()}
        state |= {f"field.{k}": v.detach().clone() for k, v in self.field.state_dict().items()}
        state |= self.geometry.state_dict() | self.adam.state_dict()
        return state | guidance_state(self.guidance)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state_dict; the stage must be freshly constructed with the same settings."""
        self.step_index = int(state["step_index"])
        self.generator.set_state(state["generator"].cpu())
        self.field.load_state_dict(under_prefix(state, "field"))
        self.geometry = self._loaded_geometry(state)
        self.adam = self._optimiser(self.geometry)
        self.adam.load_state_dict(state)
        load_guidance_state(self.guidance, state)

    def _loaded_geometry(self, state: dict[str, Tensor]) -> Geometry:
        s = self.settings
        if s.geometry == "locked":
            return LockedGeometry.from_state(state, self.device, source=self.previous.mesh)
        options = {"deformation": s.deformation, "device": self.device}
        return self._moving(DMTet.from_state(Lattice(s.tets), under_prefix(state, "dmtet"), **options))

    @torch.no_grad()
    def finish(self) -> Asset:
        """Return the mesh, without floaters, and its colours. Raises: UserError where either is broken."""
        mesh = self.geometry.mesh()
        albedo = without_gradient(self.field.albedo)
        mesh.colours = albedo(torch.from_numpy(mesh.vertices).to(self.device)).float().cpu().numpy()
        if not np.isfinite(mesh.colours).all():
            raise UserError(
                "The fine stage ended with broken colours",
                f"{100 * (1 - np.isfinite(mesh.colours).mean()):.1f} % of them are not numbers",
                "lower fine.lr_texture; for a half-precision prior set its dtype to float32",
            )
        # `albedo` holds the field alone: the prior, which this stage knows, is not to live on through the export.
        locked = self.settings.geometry == "locked" and self.previous.mesh is not None
        return Asset(albedo=albedo, field=self.field, mesh=mesh, placement=self.previous.placement, locked=locked)


@torch.no_grad()
def _size(vertices: Tensor, faces: Tensor) -> dict[str, Metric]:
    """The metrics of a closed surface: its count of faces, and the volume that it bounds."""
    a, b, c = vertices.index_select(0, faces.reshape(-1)).view(-1, 3, 3).unbind(1)
    volume = metric((a * torch.linalg.cross(b, c)).sum(dtype=torch.float64) / 6)
    return {"faces": float(len(faces)), "volume": volume}
