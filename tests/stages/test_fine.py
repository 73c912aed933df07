"""The fine stage against a guidance that knows the answer: renders of a known mesh."""

import gc
import weakref

import numpy as np
import pytest
import torch

from stages.cameras import orbit_views
from stages.errors import UserError
from stages.fields.colour_fit import FitSettings
from stages.fields.hashfield import FieldSettings, HashField
from stages.fine import DetailSettings, FineSettings, FineStage
from stages.guidance.guidance import GuidanceOutput
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.mesh.tets.dmtet import DMTet
from stages.mesh.tets.initialise import InitialiseSettings
from stages.mesh.tets.tetrahedra import Lattice
from stages.render.raster import render_mesh
from stages.render.shade import ALBEDO, ShadingSettings
from stages.stage import Asset
from tests.mesh.mesh_shapes import all_ids, join, make, moved, sphere, torus

CPU = torch.device("cpu")
FIELD = FieldSettings(levels=4, log2_table=12, base=4, finest=32, hidden=16)
DETAIL = DetailSettings(levels=2, log2_table=12, finest=64)


def colour(p):
    return 0.5 + 0.4 * torch.sin(4 * p + torch.tensor([0.0, 1.0, 2.0]))


class Target:
    """Summed squared error to renders of a mesh; 4096 terms whatever the resolution, like a small prior."""

    def __init__(self, mesh: Mesh, noise: float = 0.01) -> None:
        self.vertices, self.faces = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces)
        self.noise, self.generator = noise, torch.Generator().manual_seed(0)
        self.calls = []

    def render(self, views, size, shading, backdrop):
        return render_mesh(self.vertices, self.faces, colour, views, size, size, shading=shading, backdrop=backdrop)

    def __call__(self, images, views, progress, textureless=False, *, backdrop=None, shading=None, part=None):
        assert images.shape[:3] == backdrop.shape[:3] and textureless == shading.textureless
        self.calls.append((len(views), progress))
        noise = self.noise * torch.randn(images.shape, generator=self.generator)  # so that its generator matters
        with torch.no_grad():
            target = self.render(views, images.shape[1], shading, backdrop).colour
        loss = (images + noise - target).square().sum() * 4096 / images[0].numel() / len(views)
        error = (images.detach() - target).square().mean()
        return GuidanceOutput(loss, {"agreement_db": float(-10 * torch.log10(error + 1e-10))})

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def settings(**changes) -> FineSettings:
    base = {"steps": 8, "resolution": 48, "views_per_step": 2, "tets": 12, "lr_sdf": 8e-3, "lr_texture": 0.05}
    base |= {"field": FIELD, "detail": DETAIL, "normal_consistency": 50.0, "laplacian": 50.0, "preview_size": 32}
    base["initialise"] = InitialiseSettings(samples=32, candidates=12)
    return FineSettings(**(base | changes))


def stage(guidance=None, previous=None, seed=0, **changes) -> FineStage:
    return FineStage(settings(**changes), guidance or Target(torus()), CPU, seed, previous)


def coarse_asset(radius: float = 0.5) -> Asset:
    field = HashField(FIELD, torch.Generator().manual_seed(5))

    def density(points):
        return 200 * torch.sigmoid(-60 * (points.norm(dim=1) - radius))

    return Asset(density=density, albedo=field.albedo, field=field)


def overlap(fine: FineStage, target: Target) -> float:
    views = orbit_views([20.0, 140.0, 260.0], 25.0)
    a = fine.render(views, 96).mask
    b = target.render(views, 96, ALBEDO, torch.zeros(3)).mask
    return float(torch.minimum(a, b).sum() / torch.maximum(a, b).sum())


def solid(fine: FineStage) -> bool:
    with torch.no_grad():
        surface = fine.surface()
    return measure(Mesh(surface.vertices.numpy(), surface.faces.numpy())).solid


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_sphere_becomes_the_target_and_stays_solid_at_every_step():
    target = Target(torus(0.55, 0.25))
    fine = stage(target, steps=40, resolution=56, tets=14, views_per_step=3)
    before = overlap(fine, target)
    agreement = []
    for _ in range(40):
        agreement.append(fine.step()["agreement_db"])
        assert solid(fine)
    assert before < 0.75 and overlap(fine, target) > before + 0.12, (before, overlap(fine, target))
    assert np.mean(agreement[-5:]) > np.mean(agreement[:5]) + 2.5
    assert measure(fine.finish().mesh).solid


def test_resumed_run_equals_uninterrupted_one_bitwise():
    whole = stage(lr_sdf=0.1)
    for k in range(8):
        whole.step()
        if k == 3:
            saved = {key: value.clone() for key, value in whole.state_dict().items()}
            rebuilt = whole.geometry.dmtet.rebuilds
    assert whole.geometry.dmtet.rebuilds > rebuilt  # the band moved after it was saved, moments and all
    resumed = stage(seed=99, lr_sdf=0.1)  # everything drawn in the constructor is overwritten
    resumed.load_state_dict(saved)
    metrics = [resumed.step() for _ in range(4)]
    assert equal(whole.state_dict(), resumed.state_dict())
    assert np.array_equal(whole.finish().mesh.vertices, resumed.finish().mesh.vertices)
    assert all(np.isfinite(v) for m in metrics for v in m.values())


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not():
    states = []
    for seed in (1, 1, 2):
        fine = stage(seed=seed, steps=3)
        for _ in range(3):
            fine.step()
        states.append(fine.state_dict())
    assert equal(states[0], states[1]) and not equal(states[0], states[2])


def test_loading_a_state_does_not_convert_the_density_again():
    first = stage(previous=coarse_asset())
    first.step()

    def forbidden(points):
        raise AssertionError("the density was evaluated")

    asset = coarse_asset()
    second = stage(previous=Asset(density=forbidden, field=asset.field))
    second.load_state_dict(first.state_dict())
    second.step()
    assert second.step_index == 2


def test_start_has_the_coarse_surface_and_the_coarse_colours_and_leaves_the_coarse_field_alone():
    asset = coarse_asset(0.45)
    before = {k: v.clone() for k, v in asset.field.state_dict().items()}
    fine = stage(previous=asset, tets=20)
    mesh = fine.finish().mesh
    radius = np.linalg.norm(mesh.vertices, axis=1)
    assert 0.43 < radius.mean() < 0.53 and radius.std() < 0.02
    expected = asset.field.albedo(torch.from_numpy(mesh.vertices)).detach().numpy()
    np.testing.assert_allclose(mesh.colours, expected, atol=1e-5)
    first, *_, last = [fine.step() for _ in range(3)]
    assert first["start_match"] > 0.8 and first["start_level"] > 0 and "start_level" not in last
    assert equal(before, asset.field.state_dict())
    assert not torch.equal(fine.field.table, asset.field.table)


def test_parts_of_a_step_add_up_to_the_whole_step():
    actual = []
    for accumulate in (1, 2):
        target = Target(torus(), noise=0.0)
        fine = stage(target, accumulate=accumulate)
        history = {}

        def keep(progress, metrics, fine=fine, history=history):
            history.update({k: p.grad.clone() for k, p in fine.adam.parameters.items()})
            return 0.0

        fine._update = keep
        fine.step()
        actual.append((history, target.calls))
    assert actual[0][1] == [(2, 0.0)] and actual[1][1] == [(1, 0.0), (1, 0.0)]
    for name, gradient in actual[0][0].items():
        assert (gradient - actual[1][0][name]).norm() <= 1e-4 * gradient.norm(), name
    assert actual[0][0]["dmtet.sdf"].norm() > 0 and actual[0][0]["field.table"].norm() > 0


def test_locked_geometry_is_painted_and_not_moved():
    mesh = torus(n=24, m=12)
    target = Target(mesh)
    changes = {"geometry": "locked", "steps": 25, "shading": ShadingSettings(diffuse_probability=0)}
    fine = stage(target, Asset(mesh=mesh), **changes)
    agreement = [fine.step()["agreement_db"] for _ in range(25)]
    result = fine.finish().mesh
    np.testing.assert_array_equal(result.vertices, mesh.vertices)
    np.testing.assert_array_equal(result.faces, mesh.faces)
    assert np.mean(agreement[-5:]) > np.mean(agreement[:5]) + 4
    again = stage(Target(mesh), Asset(mesh=mesh), **changes)
    again.load_state_dict(fine.state_dict())
    assert equal(again.state_dict(), fine.state_dict())


def painted(mesh: Mesh) -> Mesh:
    """With the target's colours at its vertices."""
    mesh.colours = colour(torch.from_numpy(mesh.vertices)).numpy()
    return mesh


@pytest.mark.slow
def test_a_users_mesh_becomes_the_first_surface_in_its_own_colours():
    fit = FitSettings(steps=60, points=1024)
    fine = stage(previous=Asset(mesh=painted(torus(0.55, 0.22))), tets=24, fit=fit, steps=3)
    first = fine.step()
    assert first["start_missed"] == 0 and first["start_faces"] == 4096 and first["start_colour_error"] < 0.08
    fine = stage(previous=Asset(mesh=painted(torus(0.55, 0.22))), tets=24, fit=fit)
    mesh = fine.finish().mesh
    ring = np.hypot(np.linalg.norm(mesh.vertices[:, [0, 2]], axis=1) - 0.55, mesh.vertices[:, 1])
    np.testing.assert_allclose(ring, 0.22, atol=0.03)
    expected = colour(torch.from_numpy(mesh.vertices)).numpy()
    assert np.abs(mesh.colours - expected).mean() < 0.06


@pytest.mark.slow
def test_resumed_start_from_a_mesh_equals_uninterrupted_one_bitwise():
    def fresh(seed):
        return stage(seed=seed, previous=Asset(mesh=painted(torus())), fit=FitSettings(steps=4, points=256), steps=4)

    whole = fresh(0)
    for k in range(4):
        whole.step()
        if k == 1:
            saved = {key: value.clone() for key, value in whole.state_dict().items()}
    resumed = fresh(9)
    resumed.load_state_dict(saved)
    for _ in range(2):
        resumed.step()
    assert equal(whole.state_dict(), resumed.state_dict())


@pytest.mark.slow
def test_small_parts_of_a_users_mesh_are_kept():
    both = join(sphere(0.4, 24, 12), moved(sphere(0.06, 12, 8), (0.7, 0, 0)))  # 2 % of the large one's area
    assert measure(stage(previous=Asset(mesh=both), tets=32).finish().mesh).components == 2
    assert measure(stage(previous=Asset(mesh=both), tets=32, keep=1e-4).finish().mesh).components == 2


def test_a_locked_file_with_seams_keeps_its_bytes_and_only_its_colours_learn():
    ball = sphere(0.7, 16, 8)
    split_ball = make(ball.vertices[ball.faces].reshape(-1, 3), np.arange(3 * len(ball.faces)).reshape(-1, 3))
    split_ball.uv, split_ball.uv_faces = (
        np.random.default_rng(0).random((len(split_ball.vertices), 2)).astype(np.float32),
        split_ball.faces,
    )
    before = {k: v.copy() for k, v in vars(split_ball).items() if v is not None}
    target = Target(ball)
    kinds = []
    call = Target.__call__

    def watched(images, views, progress, textureless=False, **options):
        kinds.append(options["shading"].kind)
        return call(target, images, views, progress, textureless, **options)

    bare = ShadingSettings(albedo_until=0, diffuse_probability=1, textureless_probability=1)
    fine = stage(watched, Asset(mesh=split_ball), geometry="locked", steps=4, shading=bare)
    for _ in range(4):
        assert fine.step()["grad_norm"] > 0
    assert kinds == ["lambert"] * 4  # a shape that stays has nothing to learn from a textureless view
    assert all(name.startswith("field.") for name in fine.adam.parameters)
    assert not fine.surface().vertices.requires_grad
    assert len(fine.surface().vertices) == len(ball.vertices)  # shaded smoothly, without the file's seams
    asset = fine.finish()
    assert asset.locked
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(asset.mesh, name), value)
        np.testing.assert_array_equal(getattr(split_ball, name), value)
    assert not np.array_equal(asset.mesh.colours, split_ball.colours)


@pytest.mark.slow
def test_smoothness_terms_smooth():
    roughness = []
    for weight in (0.0, 3000.0):
        fine = stage(steps=12, normal_consistency=weight, laplacian=weight, tets=12)
        dmtet = fine.geometry.dmtet
        with torch.no_grad():
            dmtet.sdf += 0.03 * torch.randn(dmtet.sdf.shape, generator=torch.Generator().manual_seed(0))
        dmtet.step_done([])
        for _ in range(12):
            metrics = fine.step()
        if weight:
            roughness.append((metrics["bend"], metrics["rough"]))
        else:
            fine.geometry.normal_consistency = fine.geometry.laplacian = 1e-9
            metrics = fine.step()
            roughness.append((metrics["bend"], metrics["rough"]))
    assert roughness[1][0] < 0.3 * roughness[0][0] and roughness[1][1] < 0.3 * roughness[0][1]


def test_preview_changes_nothing_and_shows_three_rows_of_four():
    fine = stage()
    fine.step()
    before = fine.state_dict()
    sheet = fine.preview()
    assert sheet.shape == (3 * 32, 4 * 32, 3) and sheet.dtype == np.uint8
    assert sheet.reshape(3, 32, 4, 32, 3).std(axis=(1, 3))[1:].max(-1).min() > 10  # in each picture
    assert np.array_equal(sheet, fine.preview()) and equal(before, fine.state_dict())
    assert (sheet[0, 0] == 188).all()  # linear 0.5 behind the object


def test_state_is_flat_tensors_and_the_headline_names_the_size():
    fine = stage()
    metrics = fine.step()
    state = fine.state_dict()
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    assert {"adam.dmtet.sdf.exp_avg", "dmtet.ids", "generator", "guidance.generator", "step_index"} <= state.keys()
    assert "k faces" in fine.headline(metrics) and "dB" in fine.headline(metrics)
    assert {"surface", "render", "guidance", "backward", "optimiser"} <= fine.times.keys()
    assert all(isinstance(v, float) and np.isfinite(v) for v in metrics.values())


def test_a_non_finite_gradient_is_skipped_and_gives_up_after_a_while():
    class Broken(Target):
        def __call__(self, images, *args, **options):
            return GuidanceOutput(images.sum() * float("nan"), {})

    fine = stage(Broken(torus()), max_skipped=3)
    before = {k: v for k, v in fine.state_dict().items() if k.startswith(("field", "dmtet"))}
    assert fine.step()["grad_norm"] == -1.0
    after = {k: v for k, v in fine.state_dict().items() if k.startswith(("field", "dmtet"))}
    assert equal(before, after)
    fine.step()
    with pytest.raises(UserError, match="diverged"):
        fine.step()


def test_the_asset_holds_the_field_and_lets_the_prior_go():
    target = Target(torus())
    fine = stage(target, steps=1)
    fine.step()
    asset, target_ref = fine.finish(), weakref.ref(target)
    del fine, target
    gc.collect()
    assert target_ref() is None
    points = torch.from_numpy(asset.mesh.vertices[:5])
    torch.testing.assert_close(asset.albedo(points), asset.field.albedo(points).detach())
    assert not asset.albedo(points).requires_grad


def test_finish_drops_floaters():
    fine = stage(tets=24)
    lattice = Lattice(24)
    ids = all_ids(lattice)
    p = lattice.positions(ids)
    sdf = np.minimum(np.linalg.norm(p, axis=1) - 0.4, np.linalg.norm(p - np.float32([0.6, 0.6, 0]), axis=1) - 0.08)
    fine.geometry.dmtet = DMTet(lattice, ids, sdf)
    with torch.no_grad():
        surface = fine.surface()
    assert measure(Mesh(surface.vertices.numpy(), surface.faces.numpy())).components == 2
    actual = measure(fine.finish().mesh)
    assert actual.components == 1 and actual.solid and abs(actual.volume / (4 / 3 * np.pi * 0.4**3) - 1) < 0.05


@pytest.mark.parametrize(
    ("previous", "changes", "what"),
    [
        (None, {"views_per_step": 3, "accumulate": 2}, "accumulate"),
        pytest.param(
            Asset(mesh=make([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])),
            {},
            "cannot be made a body",
            marks=pytest.mark.slow,
        ),
        (Asset(density=lambda p: torch.zeros(len(p))), {}, "nothing to make a mesh of"),
    ],
)
def test_what_cannot_be_done_is_refused(previous, changes, what):
    with pytest.raises(UserError, match=what):
        stage(previous=previous, **changes).step()


def test_settings_refuse_unknown_keys_and_moves_that_turn_tetrahedra_over():
    with pytest.raises(ValueError):
        FineSettings(surprise=1)
    with pytest.raises(ValueError):
        FineSettings(deformation=0.25)
