"""Camera tokens: what a prior is told of its views, and that only a prior that was taught them is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.cameras import CameraSettings, Views, orbit_views, sample_views
from stages.errors import UserError
from stages.guidance.camera import NUMBERS, CameraTokens, view_numbers
from stages.guidance.diffusion import DiffusionSettings, load_prior
from stages.guidance.prior import ViewContext
from stages.render.shade import ALBEDO, Shading
from tests import tiny_folders

GREY = torch.full((3,), 0.4)


def told(views: Views, **more) -> torch.Tensor:
    return view_numbers(views, GREY, **more)


def test_numbers_of_the_four_sides():
    numbers = told(orbit_views([0.0, 90.0, 180.0, 270.0], 0.0))
    assert numbers.shape == (4, NUMBERS)
    assert torch.allclose(numbers[:, :3], torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0, -1], [-1, 0, 0]]), atol=1e-6)
    assert torch.allclose(numbers[:, 4], torch.tensor([1.0, -1, 1, -1]), atol=1e-6)
    assert torch.allclose(numbers[:, 5:7], torch.zeros(4, 2), atol=1e-5)  # the object is in the middle of the picture
    assert torch.allclose(numbers[:, 7:], numbers[:1, 7:].expand(4, -1), atol=1e-5)  # the light goes with the camera


def test_every_view_has_numbers_of_its_own_and_of_moderate_size():
    views = sample_views(CameraSettings(), 400, torch.Generator().manual_seed(0))
    numbers = told(views, ambient=0.5)
    assert torch.isfinite(numbers).all() and numbers.abs().max() < 4
    distance = torch.cdist(numbers, numbers) + 10 * torch.eye(400)
    assert distance.min() > 0.01


def test_zoom_shift_and_backdrop_are_told():
    near, far = (told(orbit_views([30.0], 20.0, distance=d))[0] for d in (2.8, 3.2))
    assert near[7] > far[7] and torch.allclose(near[:7], far[:7], atol=1e-5)
    views = orbit_views([0.0], 0.0)
    moved = views.c2w.clone()
    moved[:, 0, 3] += 0.1  # the camera steps to its right: the object goes left in the picture
    shifted = told(Views(moved, views.fov_deg, views.azimuth_deg, views.elevation_deg, views.light))[0]
    assert shifted[5] < -0.1 and abs(float(shifted[6])) < 1e-6
    picture = GREY.expand(1, 8, 8, 3)
    assert torch.allclose(view_numbers(views, picture), view_numbers(views, GREY), atol=1e-5)
    assert not torch.equal(view_numbers(views, 0.9 * GREY), view_numbers(views, GREY))


def test_light_counts_only_where_it_has_a_direction():
    views = orbit_views([0.0], 0.0)
    other = Views(views.c2w, views.fov_deg, views.azimuth_deg, views.elevation_deg, -views.light)
    assert torch.equal(told(views), told(other))
    assert not torch.equal(told(views, ambient=0.3), told(other, ambient=0.3))
    assert not torch.equal(told(views, ambient=0.3), told(views, ambient=0.3, textureless=True))


@pytest.fixture
def folder(tmp_path):
    made = tiny_folders.stable_diffusion(tmp_path / "sd")
    width = load_prior(made, "cpu").unet.config.cross_attention_dim
    torch.manual_seed(0)
    CameraTokens(width).save(made / "camera")
    return made


def test_a_prior_with_the_part_draws_by_the_camera_and_without_the_setting_it_does_not(folder):
    views = orbit_views([0.0, 120.0], 15.0)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1, -1)
    t = torch.tensor([600, 600])

    def predict(prior, context):
        return prior.predict_noise(z, t, prior.embed(["a mug"]).expand(2, -1, -1), context)

    prior = load_prior(folder, "cpu")
    context = ViewContext(views, GREY, ALBEDO)
    front, side = predict(prior, context)
    assert (front - side).abs().max() > 1e-3
    assert not torch.equal(front, predict(prior, ViewContext(views, 0.5 * GREY, ALBEDO))[0])
    assert not torch.equal(front, predict(prior, ViewContext(views, GREY, Shading(0.4, 0.6)))[0])
    twice = prior.predict_noise(
        z.repeat(2, 1, 1, 1), t.repeat(2), prior.embed(["a mug"]).expand(4, -1, -1), context.repeat(2)
    )
    assert torch.allclose(twice, torch.stack([front, side, front, side]), atol=1e-5)

    plain = load_prior(folder, "cpu", settings=DiffusionSettings(camera=False))
    a, b = predict(plain, context)
    assert plain.camera is None and torch.allclose(a, b, atol=1e-6) and not torch.allclose(a, front, atol=1e-3)
    assert torch.equal(predict(prior, None), predict(plain, None))  # nothing known of the views: nothing told
    assert torch.equal(predict(prior, ViewContext(views)), predict(plain, None))


def test_saved_tokens_come_back_and_damaged_ones_are_refused(folder):
    made = CameraTokens(24, tokens=2)
    made.save(folder / "camera")
    numbers = told(orbit_views([10.0, 200.0], 5.0), ambient=0.6)
    back = CameraTokens.load(folder / "camera")
    assert back(numbers).shape == (2, 2, 24)
    assert np.allclose(back(numbers), made(numbers).detach(), atol=5e-3)
    (folder / "camera" / "model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(UserError, match="Cannot load the camera tokens"):
        load_prior(folder, "cpu")
    load_prior(folder, "cpu", settings=DiffusionSettings(camera=False))
