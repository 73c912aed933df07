"""The CLIP-Mesh stage under small stand-in guidances and a tiny CLIP: shape and colours follow, resume, refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.cameras import CameraSettings, orbit_views, to_clip
from stages.clip_mesh import ClipMeshSettings, ClipMeshStage
from stages.errors import UserError
from stages.fields.backdrops import BackdropSettings
from stages.guidance.clip import ClipScorer
from stages.guidance.clip_guidance import ClipGuidance, ClipGuidanceSettings
from stages.kernels.raster import interpolate, rasterise, texture
from stages.kernels.srgb import linear_to_srgb
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.mesh.place import PlaceSettings, place
from stages.mesh.subdivision.control import control_sphere
from stages.mesh.texture.finalise import ExportSettings, finalise
from stages.prompts import PromptSettings, ViewPrompts
from stages.render.shade import ALBEDO, ShadingSettings
from stages.stage import Asset
from tests.tiny_clip import pocket_like
from tests.toy_pipeline import octahedron

NEAR = CameraSettings(distance=(3.0, 3.0), fov_deg=(38.0, 38.0), jitter_position=0, jitter_target=0, jitter_up=0)
GREY = BackdropSettings(copies=1, noise=0, checkerboard=0, fourier=0, grey=1, blur=(0, 0), grey_range=(0.5, 0.5))


class Noisy:
    """Guidance with a generator of its own; remembers how it was called."""

    def __init__(self):
        self.generator, self.calls = torch.Generator().manual_seed(7), []

    def __call__(self, images, views, progress, textureless=False, *, backdrop, shading):
        assert textureless == shading.textureless and 0 <= progress < 1
        self.calls.append((len(views), textureless, views.azimuth_deg, backdrop))
        noise = torch.randn(images.shape, generator=self.generator)
        return SimpleNamespace(loss=((images - 0.4 + 0.1 * noise).square()).mean(), metrics={"clip": 20.0})

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


class Green:
    """Guidance towards a picture that is green all over."""

    def __call__(self, images, views, *args, **kwargs):
        return SimpleNamespace(loss=(images - torch.tensor([0.0, 0.6, 0.1])).square().mean(), metrics={})


def small(**changes) -> ClipMeshSettings:
    values = {"steps": 6, "resolution": 24, "views_per_step": 3, "control": 1, "texture_size": 32, "padding": 2}
    return ClipMeshSettings(**(values | {"preview_size": 24} | changes))


def stage(settings=None, guidance=None, seed=0, previous=None) -> ClipMeshStage:
    return ClipMeshStage(settings or small(), guidance or Noisy(), torch.device("cpu"), seed, previous)


def run(stage, steps):
    return [stage.step() for _ in range(steps)]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_surface_and_colours_follow_the_guidance():
    plain = ShadingSettings(albedo_until=1)
    looks = {"bare_until": 0, "cameras": NEAR, "shading": plain, "backdrops": GREY}
    clip_stage = stage(small(steps=40, lr_texture=0.05, lr_vertices=0.02, **looks), Green())
    first, *_, last = run(clip_stage, 40)
    assert last["cover"] > 1.3 * first["cover"]  # the surface grows over the grey
    picture = clip_stage.render(orbit_views([0.0, 90.0, 200.0], 10.0), 32, shading=ALBEDO, backdrop=torch.zeros(3))
    inside = picture.colour[picture.mask[..., 0] > 0.99]
    assert torch.allclose(inside.mean(0), torch.tensor([0.0, 0.6, 0.1]), atol=0.06)
    asset = clip_stage.finish()
    assert measure(asset.mesh).solid and asset.albedo is None
    assert np.abs(asset.mesh.vertices).max() <= 1.3  # the control vertices stay in the box


@pytest.mark.slow
def test_finished_mesh_shows_its_texture_where_the_stage_did():
    clip_stage = stage()
    run(clip_stage, 2)
    mesh = clip_stage.finish().mesh
    exported = finalise(mesh, None, ExportSettings(faces=4), notes=(notes := {}))
    assert exported is mesh and notes["unwrap"] == "own" and notes["charts"] >= 4 and 0.2 < notes["coverage"] < 1
    assert mesh.faces.shape == mesh.uv_faces.shape == (320, 3)
    assert mesh.texture.shape == mesh.normal_map.shape == (32, 32, 3)
    assert (mesh.normal_map[..., 2] > 200).all()  # still nearly upright after two steps
    views = orbit_views([30.0], 20.0)
    picture = clip_stage.render(views, 48, shading=ALBEDO, backdrop=torch.zeros(3))
    vertices = torch.from_numpy(mesh.vertices)
    rast = rasterise(to_clip(vertices, views), torch.from_numpy(mesh.faces), 48, 48)
    uv = interpolate(torch.from_numpy(mesh.uv), rast, torch.from_numpy(mesh.uv_faces))
    looked_up = texture(torch.from_numpy(mesh.texture).float() / 255, uv)
    inside = (picture.mask[..., 0] > 0.999) & (rast[..., 3] > 0)
    assert inside.sum() > 200
    assert torch.allclose(looked_up[inside], linear_to_srgb(picture.colour)[inside], atol=0.02)


def test_first_half_shows_every_second_view_without_texture():
    guidance = Noisy()
    run(stage(small(steps=4, views_per_step=5), guidance), 4)
    kinds = [(count, textureless) for count, textureless, *_ in guidance.calls]
    assert kinds == [(2, False), (3, True)] * 2 + [(5, False)] * 2
    (_, _, coloured, behind), (_, _, bare, _) = guidance.calls[:2]
    assert behind.shape == (2, 24, 24, 3)
    both = torch.cat([coloured, bare]).sort().values
    assert float((both.diff() - 72).abs().max()) < 1e-3  # the two looks share one even round
    assert float((coloured[0] - coloured[1]).abs()) > 100


def test_textureless_views_leave_the_colours_alone_and_move_the_normals():
    settings = small(views_per_step=1, steps=2, lr_texture=0.5)  # one view: the bare one
    clip_stage = stage(settings)
    clip_stage._prepare()
    colour, normal = clip_stage.colour_map.detach().clone(), clip_stage.normal_map.detach().clone()
    clip_stage.step()
    assert torch.equal(clip_stage.colour_map, colour) and not torch.equal(clip_stage.normal_map, normal)


def test_laplacian_weight_decays_as_the_published_code_multiplies_it_step_by_step():
    ramp, weight = ClipMeshSettings(laplacian=(30.0, 0.6, 0, 1, "gaussian")).laplacian, 30.0
    assert ClipMeshSettings().laplacian.shape == "gaussian"
    for step in range(1, 1001):
        weight = (weight - 0.6) * 10 ** (-step * 1e-6) + 0.6
        if step in (100, 500, 1000):
            assert ramp.at(step / 5000) == pytest.approx(weight, rel=2e-3)
    assert ramp.at(0.0) == 30.0 and ramp.at(1.0) == 0.6


def test_learning_rate_falls_by_ten_as_the_papers_does():
    clip_stage = stage(small(steps=4))
    run(clip_stage, 3)
    rates = [group["lr"] for group in clip_stage.adam.optimiser.param_groups]
    assert rates == pytest.approx([rate * 10**-0.5 for rate in (6e-3, 1e-2, 1e-2)])


@pytest.mark.slow
def test_smoothness_holds_a_noisy_control_mesh_together():
    class Nothing:
        def __call__(self, images, *args, **kwargs):
            return SimpleNamespace(loss=0 * images.sum(), metrics={})

    settings = small(steps=30, laplacian=10.0, lr_vertices=0.01)
    clip_stage = stage(settings, Nothing())
    clip_stage._prepare()
    with torch.no_grad():
        clip_stage.control += 0.08 * torch.randn(clip_stage.control.shape, generator=torch.Generator().manual_seed(0))
    rough = [m["rough"] for m in run(clip_stage, 30)]
    assert rough[-1] < 0.5 * rough[0]


def test_gradient_of_the_surface_through_the_stage_agrees_with_finite_differences():
    clip_stage = stage(small(subdivisions=2))
    clip_stage._prepare()
    weights = torch.randn(
        clip_stage.matrix.shape[0], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    clip_stage.matrix, control = clip_stage.matrix.double(), clip_stage.control.detach().double()
    clip_stage.control = torch.nn.Parameter(control.clone())
    (clip_stage.surface().pow(3) * weights).sum().backward()
    direction = torch.randn(control.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = []
    for h in (1e-6, -1e-6):
        clip_stage.control = torch.nn.Parameter(control + h * direction)
        values.append(float((clip_stage.surface().detach().pow(3) * weights).sum()))
    clip_stage.control = torch.nn.Parameter(control)
    (clip_stage.surface().pow(3) * weights).sum().backward()
    assert float((clip_stage.control.grad * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


def test_same_seed_same_bytes_another_seed_another_run():
    first, again, other = (stage(seed=seed) for seed in (1, 1, 2))
    assert run(first, 3) == run(again, 3) and same(first.state_dict(), again.state_dict())
    assert run(other, 3) != [None] * 3 and not same(first.state_dict(), other.state_dict())


@pytest.mark.slow
def test_resumed_run_has_the_same_bytes_as_an_uninterrupted_one():
    straight = stage(seed=3)
    expected = run(straight, 6)
    for stop in (0, 2, 4):  # before the first step, before and after the last textureless one
        first = stage(seed=3)
        got = run(first, stop)
        state = {k: v.clone() for k, v in first.state_dict().items()}
        second = stage(seed=99)
        second.load_state_dict(state)
        second.preview()  # looking does not change the run
        got += run(second, 6 - stop)
        assert got == expected and same(second.state_dict(), straight.state_dict())
    assert all(v.is_contiguous() for v in straight.state_dict().values())
    mesh, again = straight.finish().mesh, second.finish().mesh
    for name in ("vertices", "faces", "uv", "uv_faces", "texture", "normal_map"):
        assert np.array_equal(getattr(mesh, name), getattr(again, name))


@pytest.mark.slow
def test_a_clip_folder_guides_it_and_resume_equals_uninterrupted(tmp_path):
    scorer = ClipScorer(pocket_like(tmp_path))

    def guidance():
        prompts = ViewPrompts("a red mug", settings=PromptSettings(view_words=False))
        settings = ClipGuidanceSettings(textureless_without=["red"])
        return ClipGuidance(scorer, settings, prompts, torch.Generator().manual_seed(0))

    straight = stage(small(steps=4), guidance())
    expected = run(straight, 4)
    assert all(math.isfinite(v) for m in expected for v in m.values()) and {"clip", "cover", "rough"} <= set(
        expected[0]
    )
    first = stage(small(steps=4), guidance())
    run(first, 2)
    second = stage(small(steps=4), guidance(), seed=5)
    second.load_state_dict(first.state_dict())
    assert run(second, 2) == expected[2:] and same(second.state_dict(), straight.state_dict())
    moved = straight.control.detach() - torch.from_numpy(control_sphere(0.6, 1, 32, 2).vertices)
    assert float(moved.abs().max()) > 1e-3  # CLIP's gradient reaches the control vertices


def test_control_vertices_stay_within_the_box_or_within_what_the_start_needs():
    far = CameraSettings(distance=(9.0, 9.0))
    ball = stage(small(steps=3, lr_vertices=5.0, cameras=far))
    few = stage(small(steps=3, lr_vertices=5.0, cameras=far), previous=Asset(mesh=octahedron()))
    run(ball, 1)
    run(few, 1)
    assert float(ball.control.detach().abs().max()) == 1.0
    # an octahedron's corners at 1/2 have control vertices at 55/24 of them
    assert float(few.control.detach().abs().max()) == pytest.approx(55 / 48, rel=1e-5)


def test_placement_of_what_it_is_given_goes_on_with_the_mesh():
    mesh, placement = place(octahedron(), PlaceSettings(radius=0.5))
    clip_stage = stage(previous=Asset(mesh=mesh, placement=placement))
    assert clip_stage.finish().placement is placement


def test_starts_from_the_mesh_of_what_it_is_given():
    sphere = control_sphere(0.5, 1, 32, 2)
    flat = sphere.vertices * np.float32([1, 0.4, 1])
    picture = np.full((16, 16, 3), 90, np.uint8)
    mesh = Mesh(flat, sphere.faces, uv=sphere.uv, uv_faces=sphere.uv_faces, texture=picture)
    first = stage(previous=Asset(mesh=mesh))
    points = first.surface()
    size = (points.amax(0) - points.amin(0)).detach()
    assert float(size[1] / size[0]) == pytest.approx(0.4, abs=0.05)
    assert float(size[0]) == pytest.approx(2 * float(np.linalg.norm(flat, axis=1).max()), abs=0.05)
    assert torch.allclose(first.colour_map, torch.tensor(90 / 255))
    assert len(first.faces) == 4 * 80
    second = stage()  # what it began with lies in its checkpoint
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.surface(), first.surface())


def test_preview_is_a_contact_sheet_of_colours_clay_and_normals():
    clip_stage = stage()
    sheet = clip_stage.preview()
    assert (
        sheet.shape == (3 * 24, 4 * 24, 3) and sheet.dtype == np.uint8 and np.array_equal(sheet, clip_stage.preview())
    )
    coloured, clay, _ = sheet.astype(int).reshape(3, 24, 96, 3)
    assert np.abs(clay[..., 0] - clay[..., 2]).max() <= 1 < 5 < np.ptp(coloured[..., 0] - coloured[..., 2])


def test_headline_names_cover_and_clip():
    clip_stage = stage()
    assert clip_stage.headline({"cover": 0.314, "clip": 27.31}) == "cover 31 %, CLIP 27.3"
    assert clip_stage.headline({"cover": 0.314, "agreement_db": 12.34}) == "cover 31 %, agreement 12.3 dB"


def test_non_finite_gradients_skip_the_step_and_give_up_after_some():
    class Broken(Noisy):
        def __call__(self, images, *args, **kwargs):
            return SimpleNamespace(loss=(images * torch.nan).sum(), metrics={})

    clip_stage = stage(small(max_skipped=3), Broken())
    clip_stage._prepare()
    before = clip_stage.control.detach().clone()
    assert [m["grad_norm"] for m in run(clip_stage, 2)] == [-1.0, -1.0]
    assert torch.equal(clip_stage.control, before) and clip_stage.step_index == 2
    with pytest.raises(UserError, match="diverged"):
        clip_stage.step()


@pytest.mark.parametrize("damage, message", [(0.0, "without an object"), (math.nan, "broken numbers")])
def test_what_is_no_object_is_refused_at_the_end(damage, message):
    clip_stage = stage()
    clip_stage._prepare()
    with torch.no_grad():
        clip_stage.control.mul_(damage)
    with pytest.raises(UserError, match=message):
        clip_stage.finish()


def test_even_width_of_the_filter_is_refused():
    with pytest.raises(ValueError, match="odd"):
        ClipMeshSettings(blur_kernel=4)
