"""Camera layout: what a prior is told of its views, and that only a prior that was taught them is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from stages.cameras import CameraSettings, Views, orbit_views, sample_views, to_clip
from stages.errors import UserError
from stages.guidance.diffusion.camera import NUMBERS, CameraLayout, view_numbers
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.diffusion.settings import DiffusionSettings
from stages.guidance.prior import ViewContext
from stages.pocket import models
from stages.pocket.train import save_prior
from stages.render.shade import ALBEDO, Shading

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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of the pocket's architecture with random weights, whose camera says something."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("prior") / "pixel"
    tokenizer, camera = models.make_tokenizer(), models.make_camera(48)
    for layer in (camera.fine, camera.coarse):
        torch.nn.init.normal_(layer.weight, std=0.3)
    save_prior(
        folder,
        pipeline="IFPipeline",
        unet=models.make_unet(48),
        scheduler=models.make_scheduler(),
        tokenizer=tokenizer,
        text_encoder=models.make_text_encoder(len(tokenizer)),
        camera=camera,
    )
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "pixel"))


def test_a_prior_with_the_part_draws_by_the_camera_and_without_the_setting_it_does_not(folder):
    views = orbit_views([0.0, 120.0], 15.0)
    z = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1, -1)
    t = torch.tensor([600, 600])

    def predict(prior, context):
        return prior.predict_noise(z, t, prior.embed(["a red mug"]).expand(2, -1, -1), context)

    prior = load_prior(folder, "cpu")
    context = ViewContext(views, GREY, ALBEDO)
    front, side = predict(prior, context)
    assert (front - side).abs().max() > 1e-3
    assert not torch.equal(front, predict(prior, ViewContext(views, 0.5 * GREY, ALBEDO))[0])
    assert not torch.equal(front, predict(prior, ViewContext(views, GREY, Shading(0.4, 0.6)))[0])
    in_parts = load_prior(folder, "cpu", settings=DiffusionSettings(max_batch=3))
    for one in (prior, in_parts):
        embedding = one.embed(["a red mug"]).expand(4, -1, -1)
        twice = one.predict_noise(z.repeat(2, 1, 1, 1), t.repeat(2), embedding, context.repeat(2))
        assert torch.allclose(twice, torch.stack([front, side, front, side]), atol=1e-4)

    plain = load_prior(folder, "cpu", settings=DiffusionSettings(camera=False))
    a, b = predict(plain, context)
    assert plain.camera is None and torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, front, atol=1e-3)
    assert torch.equal(predict(prior, None), predict(plain, None))  # nothing known of the views: nothing told
    assert torch.equal(predict(prior, ViewContext(views)), predict(plain, None))


def test_a_point_of_the_volume_is_seen_where_the_camera_projects_it():
    views = sample_views(CameraSettings(), 3, torch.Generator().manual_seed(2))
    layout = models.make_camera(48)
    points = layout._points(told(views))  # [3, 8, 16, 16, 3]
    clip = to_clip(points.reshape(-1, 3), views).reshape(3, 3, 8, 16, 16, 4)
    grid = (torch.arange(16) + 0.5) / 8 - 1
    for k in range(3):
        seen = clip[k, k, ..., :2] / clip[k, k, ..., 3:]
        assert (seen[..., 0] - grid).abs().max() < 0.1  # half a pixel of 16 is 0.06; the up vector's jitter is not told
        assert (seen[..., 1] + grid[:, None]).abs().max() < 0.1


def test_what_is_learnt_from_one_side_shows_from_the_other():
    torch.manual_seed(0)
    layout = models.make_camera(3)
    text, views = torch.randn(1, 20, models.WIDTH), orbit_views([0.0, 90.0, 180.0], 0.0)
    wanted = torch.zeros(1, 3, 16, 16)
    wanted[..., 4:12, 8:12] = 1  # on the right from the front
    optimiser = torch.optim.Adam(layout.parameters(), lr=3e-3)
    for _ in range(150):
        pictures = layout.picture(layout.features(text, told(views[:1])))
        optimiser.zero_grad()
        (pictures - wanted).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        behind = layout.picture(layout.features(text, told(views[2:])))[0].mean(0)
    assert behind[4:12, 4:8].mean() > 1.25 * behind[4:12, 8:12].mean()  # on the left from behind, never shown


def test_saved_layout_comes_back_and_a_damaged_one_is_refused(folder):
    numbers = told(orbit_views([10.0, 200.0], 5.0), ambient=0.6)
    text = torch.randn(2, 20, models.WIDTH)
    made = models.make_camera(48)
    made.save(folder / "camera")
    back = CameraLayout.load(folder / "camera")
    assert torch.allclose(back.features(text, numbers), made.features(text, numbers), atol=5e-2)
    assert all(not p.requires_grad for p in back.parameters())
    with torch.no_grad():
        made.fine.bias += 1
    other = folder.with_name("latent") / "camera"
    made.save(other, "../../pixel/camera")
    assert (other / "model.safetensors").stat().st_size < 1000  # what is the same is not there twice
    again = CameraLayout.load(other)
    assert torch.equal(again.fine.bias, made.fine.bias) and torch.equal(again.query, back.query)
    (folder / "camera" / "model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(UserError, match="Cannot load the camera layout"):
        load_prior(folder, "cpu")
    load_prior(folder, "cpu", settings=DiffusionSettings(camera=False))


def test_the_folder_is_still_one_for_diffusers_own_pipeline(folder):
    from diffusers import UNet2DConditionModel

    prior = load_prior(folder, "cpu")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
    z, text = torch.randn(1, 3, 64, 64), prior.embed(["a red mug, front view"])
    with torch.no_grad():
        v = unet(torch.nn.functional.pixel_unshuffle(z, 4), 500, text).sample
    a = prior.alphas_cumprod[500]
    eps = a.sqrt() * torch.nn.functional.pixel_shuffle(v, 4) + (1 - a).sqrt() * z
    assert torch.allclose(prior.predict_noise(z, torch.tensor([500]), text), eps.float(), atol=1e-3)
