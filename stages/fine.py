"""The fine stage: score distillation of a latent prior at 512x512 into a DMTet mesh with a colour field (Magic3D).

One step, top to bottom in :meth:`FineStage.step`:
    surface                    <- marching tetrahedra of the signed distances, closed and oriented
    views, shading, background <- random
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
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stages.cameras import CameraSettings, Views, orbit_views, sample_views
from stages.errors import UserError
from stages.fields.background import BackgroundSettings, random_background
from stages.fields.colour_fit import FitSettings, fit_albedo
from stages.fields.hashfield import DetailSettings, FieldSettings, HashField, without_gradient
from stages.guidance.guide import Guide
from stages.kernels.smoothness import smoothness
from stages.kernels.srgb import linear_to_srgb
from stages.mesh.clean import drop_floaters
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.mesh.orient import creased
from stages.mesh.place import SPECK
from stages.mesh.sample import painted_samples
from stages.mesh.tets.dmtet import DMTet, Surface, from_function
from stages.mesh.tets.initialise import InitialiseSettings, dmtet_from_density
from stages.mesh.tets.solidify import SolidifySettings, dmtet_from_mesh
from stages.mesh.tets.tetrahedra import SAFE_MOVE, Lattice
from stages.optimise import GroupedAdam, check_accumulate, under_prefix
from stages.phases import phase
from stages.ramp import Ramp
from stages.render.raster import MeshImages, render_mesh
from stages.render.shade import ALBEDO, LAMBERT, Shading, ShadingSettings, sample_shading
from stages.stage import Asset


class FineSettings(BaseModel):
    """Everything the fine stage does, but for its guidance."""

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
    colour_moves_surface: bool = Field(
        False, description="let the colour field's slope move the surface; slower, and no better where measured"
    )
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
    max_skipped: int = Field(20, ge=1, description="non-finite gradients in a row after which the stage gives up")

    keep: float = Field(0.05, ge=0, le=1, description="at the end, drop parts below this share of the largest's area")
    preview_size: int = Field(256, ge=16, le=1024, description="side of one preview picture in pixels")


class FineStage:
    """A Stage (stages/stage.py). Deterministic in its constructor arguments; resumes bitwise from state_dict().

    Args:
        settings, guidance (None where the stage only loads and finishes), device, seed.
        previous: the coarse stage's asset: its density becomes the surface, its field the colour. Or a user's mesh,
            whose colours the field learns first. None starts from a sphere of no particular colour.
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
        self.steps, self.step_index, self.times = settings.steps, 0, {}
        self.generator = torch.Generator().manual_seed(seed)
        self.field = self._inherited_field()
        self.dmtet: DMTet | None = None  # made by _prepare, or loaded: a resumed stage does not convert again
        self.locked: Surface | None = None
        self.adam: GroupedAdam | None = None
        self.start: dict[str, float] = {}  # how the first surface was found, for the first step's metrics

    def _inherited_field(self) -> HashField:
        s, given = self.settings, self.previous.field
        field = HashField(s.field, self.generator) if given is None else copy.deepcopy(given)
        field = field.to(self.device)
        field.set_progress(1.0)
        if s.detail.levels and field.detail is None and s.detail.finest > field.spec.finest:
            field.add_detail(self.generator, s.detail.levels, s.detail.log2_table, s.detail.finest)
        field.requires_grad_(False)
        for parameter in field.albedo_parameters():
            parameter.requires_grad_(True)
        return field

    def _prepare(self) -> None:
        """Make the first surface, unless there is one."""
        if self.dmtet is None and self.locked is None:
            with phase("initialise", self.times):
                self._initialise()

    def _initialise(self) -> None:
        s, previous = self.settings, self.previous
        options = {"deformation": s.deformation, "device": self.device}
        if previous.density is not None:
            self.dmtet, level = dmtet_from_density(previous.density, Lattice(s.tets), s.initialise, **options)
            self.start = {f"start_{name}": float(value) for name, value in asdict(level).items()}
        elif previous.mesh is not None:
            self._take_over(previous.mesh, options)
        else:
            self.dmtet = from_function(Lattice(s.tets), lambda p: p.norm(dim=-1) - s.sphere, **options)
        if s.geometry == "locked" and self.locked is None:
            surface = self.dmtet.surface()
            self.dmtet = self._lock(surface.vertices.detach(), surface.faces)
        self._optimise()

    def _take_over(self, mesh: Mesh, options: dict[str, Any]) -> None:
        """Start from a user's mesh: itself where it is locked, else the body it encloses; and its colours."""
        if self.settings.geometry == "locked":
            shown = creased(mesh)  # the same triangles, shaded without the seams and edges turned over that files have
            self._lock(torch.from_numpy(shown.vertices), torch.from_numpy(shown.faces))
        else:
            self.dmtet, facts = dmtet_from_mesh(mesh, Lattice(self.settings.tets), self.settings.solidify, **options)
            self.start = {f"start_{name}": value for name, value in facts.items()}
        samples = painted_samples(mesh, self.generator)
        self.start["start_colour_error"] = fit_albedo(self.field, samples, self.settings.fit, self.device)

    def _lock(self, vertices: Tensor, faces: Tensor) -> None:
        none = torch.zeros(0, 2, dtype=torch.int32, device=self.device)  # smoothness terms are not asked for
        self.locked = Surface(vertices.float().to(self.device), faces.int().to(self.device), none, none)

    def _optimise(self) -> None:
        groups = [{f"field.{k}": p for k, p in self.field.named_parameters() if p.requires_grad}]
        if self.dmtet is not None:
            groups += [{"dmtet.sdf": self.dmtet.sdf}, {"dmtet.offset": self.dmtet.offset}]
        self.adam = GroupedAdam(
            groups,
            betas=self.settings.betas,
            eps=1e-15,
            patience=self.settings.max_skipped,
            stage="fine",
            advice="lower fine.lr_sdf or the guidance scale; for a half-precision prior set its dtype to float32",
        )

    def surface(self) -> Surface:
        """The present surface, differentiable in the DMTet's parameters."""
        self._prepare()
        return self.dmtet.surface() if self.dmtet is not None else self.locked

    def step(self) -> dict[str, float]:
        """One optimisation step over `views_per_step` views; returns metrics."""
        self._prepare()
        s, progress, times = self.settings, self.step_index / self.steps, self.times
        with phase("surface", times):
            surface = self.surface()
            leaf = surface.vertices.detach().requires_grad_(self.dmtet is not None)
        with phase("views", times):
            views = sample_views(s.cameras, s.views_per_step, self.generator).to(self.device)
            shading = sample_shading(s.shading, progress, self.generator)
            if self.locked is not None:
                shading = replace(shading, textureless=False)  # a shape that stays learns nothing from bare views
            grey = random_background(s.background, s.views_per_step, self.generator)
            backdrop = (grey if grey is not None else torch.full((s.views_per_step, 1, 1, 3), 0.5)).to(self.device)

        totals, self.start = self.start, {}
        part = s.views_per_step // s.accumulate
        for low in range(0, s.views_per_step, part):
            chosen = slice(low, low + part)
            with phase("render", times):
                images = self._render(leaf, surface.faces, views[chosen], s.resolution, shading, backdrop[chosen])
            behind = backdrop[chosen].expand(-1, s.resolution, s.resolution, 3)
            with phase("guidance", times):
                guided = self.guidance(
                    images.colour, views[chosen], progress, shading.textureless, background=behind, shading=shading
                )
            with phase("backward", times):
                if guided.loss.requires_grad:  # a view that misses a locked mesh has nothing to learn from
                    (guided.loss / s.accumulate).backward()
            for name, value in (guided.metrics | {"cover": float(images.mask.detach().mean())}).items():
                totals[name] = totals.get(name, 0.0) + value / s.accumulate
        with phase("regularisers", times):
            totals |= self._smooth(leaf, surface)
        with phase("backward", times):
            if leaf.grad is not None:
                surface.vertices.backward(leaf.grad)
                self.dmtet.spread_gradient(s.spread.at(progress))
        with phase("optimiser", times):
            totals["grad_norm"] = self._update(progress)
        self.step_index += 1
        return totals

    def _render(
        self, vertices: Tensor, faces: Tensor, views: Views, size: int, shading: Shading, backdrop: Tensor
    ) -> MeshImages:
        def albedo(points: Tensor) -> Tensor:
            return self.field.albedo(points if self.settings.colour_moves_surface else points.detach())

        background = backdrop.expand(len(views), size, size, 3)
        return render_mesh(vertices, faces, albedo, views, size, size, shading=shading, background=background)

    def _smooth(self, leaf: Tensor, surface: Surface) -> dict[str, float]:
        """Add the gradient of the smoothness terms to the vertices; returns the surface's metrics."""
        s = self.settings
        with torch.no_grad():
            a, b, c = leaf.index_select(0, surface.faces.reshape(-1)).view(-1, 3, 3).unbind(1)
            volume = float((a * torch.linalg.cross(b, c)).sum(dtype=torch.float64) / 6)
        metrics = {"faces": float(len(surface.faces)), "volume": volume}
        if self.dmtet is None:
            return metrics
        if s.normal_consistency or s.laplacian:
            bend, rough = smoothness(leaf, surface.faces, surface.edges, surface.sides)
            (s.normal_consistency * bend + s.laplacian * rough).backward()
            metrics |= {"bend": float(bend.detach()), "rough": float(rough.detach())}
        return metrics

    def _update(self, progress: float) -> float:
        """Take the optimiser step, let the band follow the surface, and return the gradient's norm; see GroupedAdam."""
        s = self.settings
        rates = [s.lr_texture.at(progress)]
        if self.dmtet is not None:
            rates += [s.lr_sdf.at(progress), s.lr_offset.at(progress)]
        norm = self.adam.step(rates, self.step_index)
        if self.dmtet is not None:
            self._follow()
        return norm

    def _follow(self) -> None:
        """Let the band follow the surface; Adam's moments go with their vertices."""
        slots = list(self.adam.moments(self.dmtet.sdf, self.dmtet.offset))
        carried = self.dmtet.step_done([state[key] for state, key in slots])
        if carried is not None:
            for (state, key), value in zip(slots, carried, strict=True):
                state[key] = value

    def headline(self, metrics: dict[str, float]) -> str:
        """Size of the mesh, and how near the renders are to what the prior would draw."""
        agreement = f", agreement {metrics['agreement_db']:.1f} dB" if "agreement_db" in metrics else ""
        return f"{metrics['faces'] / 1000:.0f}k faces{agreement}"

    @torch.no_grad()
    def preview(self) -> np.ndarray:
        """Four views at 20 deg elevation: albedo, shaded and normals in three rows; uint8 sRGB."""
        size = self.settings.preview_size
        views = orbit_views([0.0, 90.0, 180.0, 270.0], 20.0).to(self.device)
        surface, grey = self.surface(), torch.full((4, 1, 1, 3), 0.5, device=self.device)
        albedo, shaded = (
            self._render(surface.vertices, surface.faces, views, size, shading, grey) for shading in (ALBEDO, LAMBERT)
        )
        normal = torch.lerp(torch.full_like(albedo.normal, 0.5), albedo.normal * 0.5 + 0.5, albedo.mask)
        rows = [linear_to_srgb(albedo.colour), linear_to_srgb(shaded.colour), normal.clamp(0, 1)]
        sheet = torch.cat([torch.cat(list(row), dim=1) for row in rows])  # [3 size, 4 size, 3]
        return sheet.mul(255).round().to(torch.uint8).cpu().numpy()

    @torch.no_grad()
    def render(self, views: Views, size: int, *, shading=ALBEDO, backdrop: Tensor | None = None) -> MeshImages:
        """Renders without randomness or gradients on a linear colour [3], by default mid grey."""
        surface = self.surface()
        grey = torch.full((3,), 0.5) if backdrop is None else backdrop
        return self._render(surface.vertices, surface.faces, views, size, shading, grey.to(self.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Colour field, surface, Adam moments, generators and counters; flat and ready for safetensors."""
        self._prepare()
        state = {"step_index": torch.tensor(self.step_index), "generator": self.generator.get_state()}
        state |= {f"field.{k}": v.detach().clone() for k, v in self.field.state_dict().items()}
        if self.dmtet is not None:
            state |= {f"dmtet.{k}": v.clone() for k, v in self.dmtet.state_dict().items()}
        else:
            state |= {"locked.vertices": self.locked.vertices.clone(), "locked.faces": self.locked.faces.clone()}
        state |= self.adam.state_dict()
        if hasattr(self.guidance, "state_dict"):
            state |= {f"guidance.{key}": value for key, value in self.guidance.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of state_dict; the stage must be freshly constructed with the same settings."""
        s = self.settings
        self.step_index = int(state["step_index"])
        self.generator.set_state(state["generator"].cpu())
        self.field.load_state_dict(under_prefix(state, "field"))
        self.dmtet = self.locked = None
        if "locked.faces" in state:
            self._lock(state["locked.vertices"].clone(), state["locked.faces"].clone())
        else:
            options = {"deformation": s.deformation, "device": self.device}
            self.dmtet = DMTet.from_state(Lattice(s.tets), under_prefix(state, "dmtet"), **options)
        self._optimise()
        self.adam.load_state_dict(state)
        if hasattr(self.guidance, "load_state_dict"):
            self.guidance.load_state_dict(under_prefix(state, "guidance"))

    @torch.no_grad()
    def finish(self) -> Asset:
        """Drop floaters, check that the surface bounds a body, and hand it on with its colours."""
        surface, own = self.surface(), self.previous.mesh
        mesh = Mesh(surface.vertices.detach().cpu().numpy().copy(), surface.faces.cpu().numpy().copy())
        locked = self.locked is not None and own is not None
        if locked:
            mesh = replace(own)  # the file's own triangles, seams and texture coordinates
        elif self.dmtet is not None:
            mesh = drop_floaters(mesh, self.settings.keep if own is None else min(self.settings.keep, SPECK))
            found = measure(mesh)
            if not found.solid:
                raise UserError(
                    "The fine stage ended with a broken surface",
                    f"{found.boundary_edges} open edges, {found.nonmanifold_edges} edges of more than two faces, "
                    f"volume {found.volume:.2g}",
                    "lower fine.lr_sdf, or raise fine.normal_consistency",
                )
        albedo = without_gradient(self.field.albedo)
        mesh.colours = albedo(torch.from_numpy(mesh.vertices).to(self.device)).float().cpu().numpy()
        if not np.isfinite(mesh.colours).all():
            raise UserError(
                "The fine stage ended with broken colours",
                f"{100 * (1 - np.isfinite(mesh.colours).mean()):.1f} % of them are not numbers",
                "lower fine.lr_texture; for a half-precision prior set its dtype to float32",
            )
        # `albedo` holds the field alone: the prior, which this stage knows, is not to live on through the export.
        return Asset(albedo=albedo, field=self.field, mesh=mesh, placement=self.previous.placement, locked=locked)
