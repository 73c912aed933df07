"""The coarse stage with small stand-in guidances: it fits posed images, resumes bitwise, and refuses what failed."""

import math

import numpy as np
import pytest
import torch

from stages.cameras import CameraSettings, orbit_views, rays
from stages.coarse import CoarseSettings, CoarseStage
from stages.errors import UserError
from stages.fields.backdrops import BackdropSettings
from stages.fields.background import BackgroundSettings
from stages.fields.hashfield import FieldSettings
from stages.fields.occupancy import OccupancySettings
from stages.guidance.guide import GuidanceOutput
from stages.kernels.srgb import linear_to_srgb
from stages.render.shade import ALBEDO, ShadingSettings, shade
from stages.render.transmittance import TransmittanceSettings, target_opacity
from stages.stage import Asset

RADIUS = 0.55


def ball_albedo(points):
    return 0.5 + 0.35 * torch.sin(5 * points)


def ball_images(views, size, background, shading=ALBEDO):
    """Exact renders of a coloured ball, antialiased over 2x2 rays per pixel."""
    o, d = rays(views, 2 * size, 2 * size)
    half = (o * d).sum(-1)
    root = half.square() - o.square().sum(-1) + RADIUS**2
    t = -half - root.clamp_min(0).sqrt()
    points = o + t[..., None] * d
    light = views.light[:, None, None]
    colour = shade(ball_albedo(points), points / RADIUS, points, light, shading)
    big = background.repeat_interleave(2, 1).repeat_interleave(2, 2)
    image = torch.where((root > 0)[..., None], colour, big)
    return image.reshape(len(views), size, 2, size, 2, 3).mean((2, 4))


class PosedImages:
    """Guidance towards exact renders: squared error, summed over pixels and channels, averaged over views."""

    def __call__(self, images, views, progress, textureless=False, *, backdrop, shading, part):
        assert textureless == shading.textureless and 0 <= progress < 1
        target = ball_images(views, images.shape[1], backdrop, shading)
        error = (linear_to_srgb(images) - linear_to_srgb(target)).square()
        return GuidanceOutput(0.5 * error.sum() / len(views), {"mse": float(error.detach().mean())})


class Noisy:
    """Guidance with a generator of its own, whose state must travel with the stage's."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, images, views, progress, textureless=False, *, backdrop, shading, part):
        noise = torch.randn(images.shape, generator=self.generator)
        loss = ((images - 0.4 + 0.1 * noise) * (1 + progress)).square().sum() / len(views)
        return GuidanceOutput(loss, {"agreement_db": 12.3})

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def small(**changes) -> CoarseSettings:
    values = {
        "steps": 12,
        "resolution": 16,
        "views_per_step": 2,
        "samples": 48,
        "field": FieldSettings(levels=6, log2_table=11, base=4, finest=32, hidden=16),
        "occupancy": OccupancySettings(resolution=16, every=3, warmup=0.5),
        "shading": ShadingSettings(albedo_until=2 / 12),
        "background": BackgroundSettings(random_probability=0.5),
        "preview_size": 24,
    }
    return CoarseSettings(**(values | changes))


def run(stage, steps):
    return [stage.step() for _ in range(steps)]


@pytest.mark.slow
def test_a_coloured_ball_is_rebuilt_from_its_posed_images():
    settings = CoarseSettings(
        steps=100,
        resolution=32,
        views_per_step=4,
        samples=80,
        cameras=CameraSettings(elevation_deg=(-40.0, 70.0)),
        field=FieldSettings(levels=6, log2_table=14, base=8, finest=64),
        shading=ShadingSettings(albedo_until=0.6, textureless_probability=0.3),
        lr=(0.02, 0.002, 0, 1, "cosine"),
    )
    stage = CoarseStage(settings, PosedImages(), torch.device("cpu"), 0, None)
    metrics = run(stage, settings.steps)
    views = orbit_views([10.0, 100.0, 190.0, 280.0], [33.0, 5.0, -20.0, 55.0])
    grey = torch.full((3,), 0.5)
    images = stage.render(views, 64, backdrop=grey)
    target = ball_images(views, 64, grey.expand(4, 64, 64, 3))
    mse = (linear_to_srgb(images.colour) - linear_to_srgb(target)).square().mean()
    assert -10 * math.log10(float(mse)) > 25
    assert {"cover", "grad_norm", "mse", "orientation"} <= set().union(*metrics)
    asset = stage.finish()
    points = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    assert asset.density(0.8 * RADIUS * points).median() > 10 * asset.density(1.3 * RADIUS * points).median()
    error = (asset.albedo(0.97 * RADIUS * points).detach() - ball_albedo(0.97 * RADIUS * points)).abs()
    assert float(error.median()) < 0.08
    assert asset.field is stage.field and not asset.density(points).requires_grad


@pytest.mark.slow
def test_resumed_run_has_the_same_bytes_as_an_uninterrupted_one():
    settings = small()
    straight = CoarseStage(settings, Noisy(), torch.device("cpu"), 3, None)
    expected = run(straight, 12)
    for stop in (1, 7):  # before and after the first shaded step, the warm-up, an environment step
        first = CoarseStage(settings, Noisy(), torch.device("cpu"), 3, None)
        got = run(first, stop)
        state = {k: v.clone() for k, v in first.state_dict().items()}
        second = CoarseStage(settings, Noisy(), torch.device("cpu"), 99, None)
        second.load_state_dict(state)
        second.preview()  # looking does not change the run
        got += run(second, 12 - stop)
        assert got == expected
        final, reference = second.state_dict(), straight.state_dict()
        assert final.keys() == reference.keys()
        assert all(torch.equal(final[k], reference[k]) for k in final)
    assert all(isinstance(v, torch.Tensor) and v.is_contiguous() for v in reference.values())
    assert {"field.table", "adam.field.table.exp_avg", "occupancy.cells", "generator", "guidance.generator"} <= set(
        final
    )


def test_an_edit_goes_on_from_the_field_and_environment_it_is_given_with_all_levels_on():
    bands = FieldSettings(levels=6, log2_table=11, base=4, finest=32, hidden=16, bands=(1 / 3, 1))
    first = CoarseStage(small(field=bands), Noisy(), "cpu", 0)
    run(first, 12)
    first.field.set_progress(1.0)
    asset = Asset(density=first.field.density, field=first.field, background=first.background)
    before = {k: v.clone() for k, v in first.state_dict().items()}
    edit = CoarseStage(small(field=bands), Noisy(), "cpu", 5, asset)
    views = orbit_views([0.0, 120.0], 20.0)
    torch.testing.assert_close(edit.render(views, 24).colour, first.render(views, 24).colour, atol=2e-3, rtol=0)
    assert edit.step_index == 0 and len(edit.adam.optimiser.state) == 0
    run(edit, 4)
    assert bool((edit.field.bands == 1).all())  # nothing of what is there is hidden while it is edited
    saved = {k: v.clone() for k, v in edit.state_dict().items()}
    run(edit, 3)
    resumed = CoarseStage(small(field=bands), Noisy(), "cpu", 9, asset)
    resumed.load_state_dict(saved)
    run(resumed, 3)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in edit.state_dict().items())
    assert all(torch.equal(v, first.state_dict()[k]) for k, v in before.items())  # the source is untouched


def test_another_seed_is_another_run_and_the_same_seed_the_same():
    first, again, other = (CoarseStage(small(), Noisy(), torch.device("cpu"), s, None) for s in (1, 1, 2))
    a, b, c = (run(stage, 3) for stage in (first, again, other))
    assert a == b and a != c


def test_rendering_in_parts_gives_the_step_of_the_whole():
    norms = []
    for accumulate in (1, 2, 4):
        settings = small(views_per_step=4, accumulate=accumulate, opacity=0.5)
        stage = CoarseStage(settings, PosedImages(), torch.device("cpu"), 0, None)
        norms.append([m["grad_norm"] for m in run(stage, 2)])
    assert np.allclose(norms[0], norms[1], rtol=2e-3) and np.allclose(norms[0], norms[2], rtol=2e-3)


def test_copies_of_a_view_show_one_object_on_different_pictures():
    pictures = []

    class Spy(Noisy):
        def __call__(self, images, views, *args, backdrop, **kwargs):
            pictures.append((images.detach(), views, backdrop))
            return super().__call__(images, views, *args, backdrop=backdrop, **kwargs)

    stage = CoarseStage(small(backdrops=BackdropSettings(copies=3)), Spy(), torch.device("cpu"), 0, None)
    stage.step()
    images, views, behind = pictures[0]
    assert images.shape == behind.shape == (6, 16, 16, 3) and len(views) == 6
    azimuth = views.azimuth_deg.tolist()
    assert azimuth[0] == azimuth[1] == azimuth[2] != azimuth[3] == azimuth[5]
    for view in (0, 3):
        transmittance = (images[view] - images[view + 1]) / (behind[view] - behind[view + 1])
        sure = (behind[view] - behind[view + 1]).abs() > 0.1
        low, high = transmittance[sure].min(), transmittance[sure].max()
        assert -1e-3 < low < 0.95 and high < 1 + 1e-3 and high - low > 0.05
        alone = images[view] - transmittance * behind[view]  # the object over black, whatever stands behind it
        again = images[view + 2] - transmittance * behind[view + 2]
        assert torch.allclose(alone[sure], again[sure], atol=1e-3)


def test_copies_rendered_in_parts_give_the_step_of_the_whole():
    norms = []
    for accumulate in (1, 2):
        settings = small(views_per_step=2, accumulate=accumulate, backdrops=BackdropSettings(copies=2))
        stage = CoarseStage(settings, PosedImages(), torch.device("cpu"), 0, None)
        norms.append([m["grad_norm"] for m in run(stage, 2)])
    assert np.allclose(norms[0], norms[1], rtol=2e-3)


@pytest.mark.slow
def test_transmittance_thins_the_field_down_to_its_target_and_no_further():
    class Nothing(Noisy):
        def __call__(self, images, *args, **kwargs):
            return GuidanceOutput(0 * images.sum(), {})

    cameras = CameraSettings(distance=(3.0, 3.0), fov_deg=(38.0, 38.0), jitter_position=0, jitter_target=0)
    term = TransmittanceSettings(weight=0.5, opacity=0.05)
    settings = small(
        steps=60, opacity=0.0, orientation=0, transmittance=term, cameras=cameras, lr=(0.01, 0.001, 0, 1, "cosine")
    )
    stage = CoarseStage(settings, Nothing(), torch.device("cpu"), 0, None)
    metrics = run(stage, 60)
    covers = [m["cover"] for m in metrics]
    target = float(target_opacity(orbit_views([0.0], 0.0, 3.0, 38.0), 1.0, term))
    assert covers[0] > 1.5 * target
    assert metrics[0]["grad_norm"] > 0 and metrics[-1]["grad_norm"] == 0  # below the target nothing pushes
    assert 0.25 * target < covers[-1] < 1.2 * target  # Adam's momentum carries it on for some steps


def test_accumulate_must_divide_the_views():
    with pytest.raises(UserError, match="divisor of 4"):
        CoarseStage(small(views_per_step=4, accumulate=3), Noisy(), torch.device("cpu"), 0, None)


def test_non_finite_gradients_skip_the_step_and_give_up_after_some():
    class Broken(Noisy):
        def __call__(self, images, *args, **kwargs):
            return GuidanceOutput((images * torch.nan).sum(), {})

    stage = CoarseStage(small(max_skipped=3), Broken(), torch.device("cpu"), 0, None)
    before = stage.field.table.detach().clone()
    assert [m["grad_norm"] for m in run(stage, 2)] == [-1.0, -1.0]
    assert torch.equal(stage.field.table, before) and stage.step_index == 2
    with pytest.raises(UserError, match="diverged"):
        stage.step()


def test_regularisers_alone_empty_the_box_and_finish_says_so():
    class Nothing:
        def __call__(self, images, *args, **kwargs):
            return GuidanceOutput(0 * images.sum(), {})

    stage = CoarseStage(
        small(steps=25, opacity=100.0, lr=(0.2, 0.02, 0, 1, "cosine")), Nothing(), torch.device("cpu"), 0, None
    )
    covers = [m["cover"] for m in run(stage, 25)]
    assert covers[-1] < 0.1 * covers[0]
    with pytest.raises(UserError, match="empty box"):
        stage.finish()


@pytest.mark.slow
def test_entropy_pushes_opacities_to_the_ends():
    class Nothing:
        def __call__(self, images, *args, **kwargs):
            return GuidanceOutput(0 * images.sum(), {})

    half_open = []
    for entropy in (0.0, 30.0):
        settings = small(steps=25, opacity=0.0, entropy=entropy, lr=(0.05, 0.005, 0, 1, "cosine"))
        stage = CoarseStage(settings, Nothing(), torch.device("cpu"), 0, None)
        run(stage, 25)
        opacity = stage.render(orbit_views([0.0, 90.0], 20.0), 32).opacity
        half_open.append(float(((opacity > 0.1) & (opacity < 0.9)).float().mean()))
    assert half_open[1] < 0.5 * half_open[0]


def test_preview_is_a_contact_sheet_of_albedo_over_shaded_views():
    stage = CoarseStage(small(), Noisy(), torch.device("cpu"), 0, None)
    sheet = stage.preview()
    assert sheet.shape == (48, 6 * 24, 3) and sheet.dtype == np.uint8
    assert np.array_equal(sheet, stage.preview())
    assert not np.array_equal(sheet[:24], sheet[24:])


def test_headline_names_cover_and_agreement():
    stage = CoarseStage(small(), Noisy(), torch.device("cpu"), 0, None)
    assert stage.headline({"cover": 0.314}) == "cover 31 %"
    assert stage.headline({"cover": 0.314, "agreement_db": 12.34}) == "cover 31 %, agreement 12.3 dB"
    assert stage.headline({"cover": 0.314, "clip": 27.31}) == "cover 31 %, CLIP 27.3"


def test_times_by_phase_add_up_and_metrics_are_finite():
    stage = CoarseStage(small(), Noisy(), torch.device("cpu"), 0, None)
    metrics = run(stage, 4)
    assert all(isinstance(v, float) and math.isfinite(v) for m in metrics for v in m.values())
    assert {"render", "guidance", "backward", "optimiser"} <= set(stage.times) and min(stage.times.values()) >= 0


class Strong:
    """Guidance that pulls at nothing, under which the regularisers count `strength` times; keeps the sides it sees."""

    def __init__(self, strength=1.0):
        self.strength, self.sides = strength, []

    def __call__(self, images, views, progress, textureless=False, *, backdrop, shading, part):
        self.sides.append(images.shape[1:3])
        return GuidanceOutput(0 * images.sum(), {}, self.strength)


def test_regularisers_count_as_the_guidance_says():
    norms = []
    for strength, weight in ((1.0, 1.0), (0.25, 4.0), (2.0, 1.0)):
        settings = small(orientation=3 * weight, opacity=weight, entropy=2 * weight, orientation_always=True)
        norms.append(CoarseStage(settings, Strong(strength), torch.device("cpu"), 0).step()["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and norms[2] == pytest.approx(2 * norms[0], rel=1e-5)


def test_renders_have_their_share_of_the_resolution():
    guidance = Strong()
    settings = small(steps=4, resolution=64, render_share=[0.125, 1, 0.5, 0.5])
    run(CoarseStage(settings, guidance, torch.device("cpu"), 0), 4)
    assert guidance.sides == [(16, 16), (16, 16), (64, 64), (64, 64)]  # none is smaller than 16 pixels a side
