"""The CLIP-Mesh stage: a subdivision surface with a colour map and a normal map, optimised until CLIP sees the words.

Khalid et al. 2022 (arXiv 2203.13333). One step, top to bottom in :meth:`ClipMeshStage.step`:
    surface                   <- the Loop limit of the control vertices, one sparse matrix
    colour and normal map     <- low-pass filtered
    views, lights, backdrops  <- random
    loss = guidance(images) + Laplacian of the control mesh, whose weight decays
    Adam on control vertices and maps
In the first half of the stage every second view is textureless, so that shape has to carry the words as well.

Left out of the paper: its diffusion prior from text to image embeddings (a second network of another team's weights),
and the colour map's alpha channel, which the toolkit's meshes have no place for. The topology is the start's for good.
Loss convention: for a CLIP's mean cosine. Under a diffusion prior, whose loss is a sum, raise the Laplacian's weights.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from stages.cameras import CameraSettings, Views, orbit_views, sample_views
from stages.errors import UserError
from stages.fields.backdrops import BackdropSettings, random_backdrops
from stages.guidance.guide import Guide, Metric
from stages.kernels.raster import edge_topology
from stages.kernels.srgb import linear_to_srgb
from stages.mesh.measure import edges_of
from stages.mesh.mesh import Mesh
from stages.mesh.subdivision.control import ControlMesh, control_mesh, control_sphere
from stages.mesh.subdivision.loop import as_torch, limit_surface, subdivide_linearly
from stages.mesh.subdivision.regularise import laplacian
from stages.mesh.texture.bake import push_pull, texel_points
from stages.mesh.texture.uv import Unwrapper
from stages.optimise import GroupedAdam
from stages.phases import phase
from stages.ramp import Ramp
from stages.render.raster import MeshImages, render_mesh
from stages.render.shade import LAMBERT, Shading, ShadingSettings, sample_shading
from stages.render.textured import TextureMaterial, blurred_maps
from stages.stage import Asset, add_metrics, contact_sheet, cover_headline, guidance_state, load_guidance_state

SMALLEST = 0.02  # half the extent in world units below which there is no object


class ClipMeshSettings(BaseModel):
    """Settings of the CLIP-Mesh stage without its guidance; the paper's numbers, its unit sphere scaled to 0.6."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(1000, ge=1, description="optimisation steps; 5000 in the paper")
    resolution: int = Field(224, ge=16, le=2048, description="side of a training render in pixels; 512 in the paper")
    views_per_step: int = Field(25, ge=1, description="views of one optimiser step")

    radius: float = Field(0.6, gt=0.05, lt=0.95, description="of the sphere that it starts from without --init-mesh")
    control: int = Field(3, ge=0, le=5, description="control vertices of the sphere: 10 * 4^this + 2, as 642 for 3")
    control_faces: int = Field(5000, ge=4, le=100_000, description="a user's mesh of more faces is decimated to these")
    subdivisions: int = Field(1, ge=0, le=3, description="splits of the control faces in four; 0: the published code's")
    unwrap: Unwrapper = Field("auto", description="who unwraps a user's mesh without usable texture coordinates")

    texture_size: int = Field(512, ge=16, le=4096, description="side of colour map and normal map in texels")
    padding: int = Field(8, ge=2, le=64, description="least distance between UV charts in texels")
    blur_kernel: int = Field(5, ge=1, le=31, description="odd width of the maps' low-pass filter in texels; 1: none")
    blur_sigma: float = Field(3.0, ge=0, description="its standard deviation in texels")

    bare_until: float = Field(0.5, ge=0, le=1, description="share of the stage with half of the views textureless")
    cameras: CameraSettings = Field(
        default_factory=lambda: CameraSettings(
            distance=(3.0, 7.2), fov_deg=(30.0, 90.0), elevation_deg=(0.0, 85.0), elevation_beta=5.0, jitter_target=0.5
        ),
        description="distribution of views and lights",
    )
    shading: ShadingSettings = Field(
        default_factory=lambda: ShadingSettings(albedo_until=0, diffuse_probability=1.0, textureless_probability=0.0),
        description="mix of shadings; lit from the start",
    )
    backdrops: BackdropSettings = Field(
        default_factory=lambda: BackdropSettings(copies=1, fourier=0.0, colour=1.0, blur=(0.004, 0.01)),
        description="pictures behind the views, one each whatever `copies` says",
    )

    laplacian: Ramp = Field(  # as the published code, which multiplies what exceeds the end by 10^(-1e-6 k) at step k
        Ramp(0.23, 0.0045, shape="gaussian"),
        ge=0,
        description="weight of the mean squared umbrella vector, in edge lengths",
    )
    lr_vertices: Ramp = Field(
        Ramp(6e-3, 6e-4, shape="exponential"),
        gt=0,
        description="Adam learning rate of the control vertices, world units",
    )
    lr_texture: Ramp = Field(
        Ramp(1e-2, 1e-3, shape="exponential"),
        gt=0,
        description="Adam learning rate of the colour map, sRGB in [0, 1]",
    )
    lr_normal: Ramp = Field(
        Ramp(1e-2, 1e-3, shape="exponential"), gt=0, description="Adam learning rate of the normal map"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's decay rates")
    max_skipped: int = Field(20, ge=1, description="non-finite gradients in a row after which the stage gives up")
    preview_size: int = Field(192, ge=16, le=1024, description="side of one preview picture in pixels")

    @field_validator("blur_kernel")
    @classmethod
    def _odd(cls, width: int) -> int:
        if width % 2 == 0:
            raise ValueError(f"wanted an odd number of texels, got {width}")
        return width


class ClipMeshStage:
    """A Stage (stages/stage.py). Deterministic in its constructor arguments; resumes bitwise from state_dict().

    Args:
        settings: everything but the guidance.
        guidance: see stages/guidance/guidance.py; None where the stage only loads and finishes.
        device: where surface, maps and renders live.
        seed: of all that is drawn.
        previous: an asset whose mesh to start from, in the scene; None starts from a sphere.
    Source: CLIP-Mesh (arXiv 2203.13333).

    Example:
        >>> guidance = ClipGuidance(scorer, ClipGuidanceSettings(), ViewPrompts("a red mug"), torch.Generator())
        >>> stage = ClipMeshStage(ClipMeshSettings(steps=400), guidance, torch.device("cpu"), seed=0)
    """

    name = "clipmesh"

    def __init__(
        self,
        settings: ClipMeshSettings,
        guidance: Guide | None,
        device: torch.device,
        seed: int,
        previous: Asset | None = None,
    ) -> None:
        self.settings, self.guidance, self.device = settings, guidance, torch.device(device)
        self.previous = previous or Asset()
        self.steps, self.step_index, self.times = settings.steps, 0, {}
        self.generator = torch.Generator().manual_seed(seed)
        self.control: torch.nn.Parameter | None = None  # made by _prepare, or loaded: the start is not read again

    def _prepare(self) -> None:
        """Make the start, unless there is one."""
        if self.control is None:
            with phase("initialise", self.times):
                start = self._start()
                size = (self.settings.texture_size, self.settings.texture_size, 3)
                colour = torch.rand(size, generator=self.generator)
                if start.texture is not None:
                    colour = torch.from_numpy(start.texture)
                normal = torch.tensor([0.0, 0.0, 1.0]).expand(size)
                # The scene's box, or what a start of few vertices takes: its control vertices lie far outside it.
                self.bound = max(1.0, float(np.abs(start.vertices).max()))
                self._build(start, colour, normal)

    def _start(self) -> ControlMesh:
        s = self.settings
        mesh = self.previous.mesh
        if mesh is None:
            return control_sphere(s.radius, s.control, s.texture_size, s.padding)
        return control_mesh(mesh, s.control_faces, s.texture_size, s.padding, s.unwrap)

    def _build(self, start: ControlMesh, colour: Tensor, normal: Tensor) -> None:
        """Build what depends on the topology, and the parameters with their optimiser."""
        s, device = self.settings, self.device
        self.start = start
        faces, matrix = limit_surface(start.faces, len(start.vertices), s.subdivisions)
        uv, uv_faces = subdivide_linearly(start.uv, start.uv_faces, s.subdivisions)
        self.matrix = as_torch(matrix, device=device)
        self.faces, self.uv = torch.from_numpy(faces).to(device), torch.from_numpy(uv).to(device)
        self.uv_faces = torch.from_numpy(uv_faces).to(device)
        self.topology = edge_topology(self.faces, len(matrix.indptr) - 1)
        self.control_faces = torch.from_numpy(start.faces).to(device)
        self.control_edges = torch.from_numpy(edges_of(start.faces).pairs).to(device)
        begin = torch.from_numpy(start.vertices), colour, normal
        row_major = [values.detach().clone(memory_format=torch.contiguous_format).to(device) for values in begin]
        self.control, self.colour_map, self.normal_map = map(torch.nn.Parameter, row_major)
        self.adam = GroupedAdam(
            [{name: parameter} for name, parameter in self._parameters().items()],
            betas=s.betas,
            eps=1e-8,
            patience=s.max_skipped,
            stage="CLIP-Mesh",
            advice="lower clipmesh.lr_vertices, or raise clipmesh.laplacian",
        )

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"control": self.control, "colour_map": self.colour_map, "normal_map": self.normal_map}

    def surface(self) -> Tensor:
        """Return the points [V', 3] of the limit surface, differentiable in the control vertices."""
        self._prepare()
        return torch.sparse.mm(self.matrix, self.control)

    def _maps(self) -> tuple[Tensor, Tensor]:
        """Colour map and normal map [S, S, 3], low-pass filtered."""
        both = torch.cat([self.colour_map, self.normal_map], -1)
        colour, normal = blurred_maps(both, self.settings.blur_kernel, self.settings.blur_sigma).split(3, -1)
        return colour, normal

    def step(self) -> dict[str, float]:
        """Take one optimisation step over `views_per_step` views; returns metrics."""
        self._prepare()
        s, progress, times = self.settings, self.step_index / self.steps, self.times
        with phase("surface", times):
            vertices, maps = self.surface(), self._maps()
        with phase("views", times):
            views = sample_views(s.cameras, s.views_per_step, self.generator).to(self.device)
            shading = sample_shading(s.shading, progress, self.generator)
            backdrops = random_backdrops(s.backdrops, s.views_per_step, s.resolution, self.generator).to(self.device)
        looks = [(torch.arange(s.views_per_step), shading)]
        if progress < s.bare_until:  # every second view, since neighbours in the batch are neighbours on the orbit
            textureless = Shading(shading.ambient, shading.diffuse, textureless=True)
            looks = [(looks[0][0][k::2], look) for k, look in ((1, shading), (0, textureless))]

        totals: dict[str, Metric] = {}
        loss = vertices.new_zeros(())
        for part, look in looks:
            if len(part) == 0:
                continue
            share, part_views = len(part) / s.views_per_step, views[part]
            with phase("render", times):
                images = self._render(vertices, maps, part_views, s.resolution, look, backdrops[part])
            with phase("guidance", times):
                output = self.guidance(
                    images.colour, part_views, progress, look.textureless, backdrop=backdrops[part], shading=look
                )
            loss = loss + share * output.loss
            add_metrics(totals, output.metrics | {"cover": float(images.mask.detach().mean())}, share)
        with phase("regularisers", times):
            rough = laplacian(self.control, self.control_edges)
            loss = loss + s.laplacian.at(progress) * rough
        with phase("backward", times):
            loss.backward()
        with phase("optimiser", times):
            totals |= {"rough": float(rough.detach()), "grad_norm": self._update(progress, totals)}
        self.step_index += 1
        return totals

    def _render(
        self, vertices: Tensor, maps: tuple[Tensor, Tensor], views: Views, size: int, shading: Shading, backdrop: Tensor
    ) -> MeshImages:
        material = TextureMaterial(vertices, self.faces, self.uv, self.uv_faces, *maps)
        backdrop = backdrop.expand(len(views), size, size, 3)
        return render_mesh(
            vertices, self.faces, material, views, size, size,
            shading=shading, backdrop=backdrop, topology=self.topology,
        )  # fmt: skip

    @torch.no_grad()
    def _update(self, progress: float, metrics: dict[str, Metric]) -> float:
        """Take the optimiser step, keep everything in its range, and return the gradient's norm (GroupedAdam.step)."""
        s = self.settings
        rates = [rate.at(progress) for rate in (s.lr_vertices, s.lr_texture, s.lr_normal)]
        norm = self.adam.step(rates, self.step_index, metrics)
        self.control.clamp_(-self.bound, self.bound)
        self.colour_map.clamp_(0, 1)
        self.normal_map.clamp_(-1, 1)
        return norm

    def headline(self, metrics: dict[str, float]) -> str:
        """Return the share of the picture that the object covers, and what CLIP or the prior thinks of it."""
        return cover_headline(metrics)

    @torch.no_grad()
    def preview(self) -> np.ndarray:
        """Return four views at 20 deg elevation: coloured, textureless and normals in three rows; uint8 sRGB."""
        size = self.settings.preview_size
        views = orbit_views([0.0, 90.0, 180.0, 270.0], 20.0)
        coloured = self.render(views, size, shading=LAMBERT)
        bare = self.render(views, size, shading=Shading(LAMBERT.ambient, LAMBERT.diffuse, textureless=True))
        return contact_sheet([linear_to_srgb(coloured.colour), linear_to_srgb(bare.colour), coloured.normal_picture])

    @torch.no_grad()
    def render(self, views: Views, size: int, *, shading=LAMBERT, backdrop: Tensor | None = None) -> MeshImages:
        """Return renders without randomness or gradients.

        Args:
            views: B views.
            size: pixels a side.
            shading: one for all views.
            backdrop: a linear colour [3]; None: mid grey.
        """
        grey = (torch.full((3,), 0.5) if backdrop is None else backdrop).to(self.device)
        return self._render(self.surface(), self._maps(), views.to(self.device), size, shading, grey)

    def state_dict(self) -> dict[str, Tensor]:
        """Return control mesh, maps, Adam moments, generators and counters; flat and ready for safetensors."""
        self._prepare()
        state = {"step_index": torch.tensor(self.step_index)} | self.adam.state_dict()
        state |= {"bound": torch.tensor(self.bound, dtype=torch.float64), "generator": self.generator.get_state()}
        state |= {f"start.{k}": torch.from_numpy(getattr(self.start, k)) for k in ("faces", "uv", "uv_faces")}
        for name, parameter in self._parameters().items():
            state[name] = parameter.detach().clone()
        return state | guidance_state(self.guidance)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state_dict; the stage must be freshly constructed with the same settings."""
        self.step_index = int(state["step_index"])
        self.bound = float(state["bound"])
        self.generator.set_state(state["generator"].cpu())
        topology = {k: state[f"start.{k}"].cpu().numpy().copy() for k in ("faces", "uv", "uv_faces")}
        start = ControlMesh(vertices=state["control"].cpu().numpy().copy(), **topology)
        self._build(start, state["colour_map"], state["normal_map"])
        self.adam.load_state_dict(state)
        load_guidance_state(self.guidance, state)

    @torch.no_grad()
    def finish(self) -> Asset:
        """Return the mesh with its texture coordinates and maps. Raises: UserError unless it is a finite object."""
        vertices = self.surface().cpu().numpy().copy()
        maps = [m.cpu().numpy() for m in self._maps()]
        if not all(np.isfinite(values).all() for values in (vertices, *maps)):
            raise UserError(
                "The CLIP-Mesh stage ended with broken numbers",
                "positions or colours are not finite",
                "lower clipmesh.lr_vertices and clipmesh.lr_texture",
            )
        extent = float(np.ptp(vertices, axis=0).max()) / 2
        if extent < SMALLEST:
            raise UserError(
                "The CLIP-Mesh stage ended without an object",
                f"the surface shrank to {extent:.3f} world units about its middle",
                "raise clipmesh.laplacian or lower clipmesh.lr_vertices, or try another seed",
            )
        uv, uv_faces = self.uv.cpu().numpy(), self.uv_faces.cpu().numpy()
        unit = maps[1] / np.maximum(np.linalg.norm(maps[1], axis=-1, keepdims=True), 1e-6)
        colour, normal = (_bytes(_filled(m, uv, uv_faces)) for m in (maps[0], unit * 0.5 + 0.5))
        mesh = Mesh(vertices, self.faces.cpu().numpy(), uv=uv, uv_faces=uv_faces, texture=colour, normal_map=normal)
        return Asset(mesh=mesh, placement=self.previous.placement)


def _filled(image: np.ndarray, uv: np.ndarray, uv_faces: np.ndarray) -> np.ndarray:
    """A map [S, S, C] with the texels outside all charts filled from their neighbours, so that mip maps stay clean."""
    size = image.shape[0]
    covered = np.zeros(size * size, dtype=bool)
    covered[texel_points(uv, uv_faces, size)[0]] = True
    return push_pull(image.astype(np.float32), covered.reshape(size, size))


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.floor(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
