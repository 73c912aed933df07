"""The conventions of stages/cameras.py, which everything else relies on."""

import math

import pytest
import torch

from stages.cameras import (
    FAR,
    NEAR,
    CameraSettings,
    direction,
    look_at,
    orbit_views,
    projection,
    rays,
    sample_views,
    to_clip,
)


def sampled(batch=4096, seed=0, **settings):
    return sample_views(CameraSettings(**settings), batch, torch.Generator().manual_seed(seed))


def test_azimuth_0_is_in_front_90_at_plus_x_180_behind_and_elevation_is_up():
    got = direction(torch.tensor([0.0, 90.0, 180.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 90.0]))
    want = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_the_front_camera_has_world_axes():
    c2w = orbit_views([0.0], 0.0, distance=3.0).c2w[0]
    want = torch.eye(4)
    want[2, 3] = 3.0
    torch.testing.assert_close(c2w, want, atol=1e-6, rtol=0)


def test_cameras_are_rotations_looking_along_minus_z_at_the_target():
    g = torch.Generator().manual_seed(1)
    position, target = torch.randn(20, 3, generator=g) * 3, torch.randn(20, 3, generator=g) * 0.1
    c2w = look_at(position, target, torch.tensor([0.0, 1.0, 0.0]).expand(20, 3))
    rotation = c2w[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), torch.eye(3).expand(20, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(20), atol=1e-5, rtol=0)
    ahead = torch.nn.functional.normalize(target - position, dim=-1)
    torch.testing.assert_close(-c2w[:, :3, 2], ahead, atol=1e-5, rtol=0)
    assert (c2w[:, 1, 1] >= 0).all()  # the camera's up never points down


def test_points_to_the_right_and_above_land_right_and_above_in_clip_space():
    clip = to_clip(torch.tensor([[0.3, 0.0, 0.0], [0.0, 0.3, 0.0]]), orbit_views([0.0], 0.0))[0]
    ndc = clip[:, :2] / clip[:, 3:]
    assert ndc[0, 0] > 0.1 and abs(ndc[0, 1]) < 1e-6
    assert ndc[1, 1] > 0.1 and abs(ndc[1, 0]) < 1e-6
    from_the_right = to_clip(torch.tensor([[0.0, 0.0, 0.3]]), orbit_views([90.0], 0.0))[0, 0]
    assert from_the_right[0] < 0  # seen from +x, the front (+z) is on the left


def test_clip_depth_is_minus_w_at_near_and_w_at_far():
    p = projection(torch.tensor([40.0]))[0]
    for depth, want in ((NEAR, -1.0), (FAR, 1.0)):
        clip = p @ torch.tensor([0.0, 0.0, -depth, 1.0])
        assert clip[3].item() == pytest.approx(depth)
        assert (clip[2] / clip[3]).item() == pytest.approx(want, abs=1e-5)


def test_field_of_view_is_vertical():
    view, half = orbit_views([0.0], 0.0, distance=2.0, fov_deg=50.0), 2 * math.tan(math.radians(25))
    clip = to_clip(torch.tensor([[0.0, half, 0.0], [2 * half, 0.0, 0.0]]), view, aspect=2.0)[0]
    torch.testing.assert_close(clip[:, :2] / clip[:, 3:], torch.tensor([[0.0, 1.0], [1.0, 0.0]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10), (9, 4)])
def test_points_on_a_ray_project_to_its_pixel_centre(height, width):
    views = sampled(3)
    rays_o, rays_d = rays(views, height, width)
    torch.testing.assert_close(rays_d.norm(dim=-1), torch.ones(3, height, width))
    points = rays_o + 2.3 * rays_d
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    want = torch.stack([2 * x / width - 1, 1 - 2 * y / height], -1)  # row 0 at the top
    for b in range(3):
        clip = to_clip(points[b].reshape(-1, 3), views[b], width / height)[0]
        ndc = (clip[:, :2] / clip[:, 3:]).reshape(height, width, 2)
        torch.testing.assert_close(ndc, want, atol=2e-5, rtol=0)


def test_to_clip_is_differentiable_and_keeps_float64():
    vertices = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: to_clip(v, orbit_views([30.0, 200.0])), (vertices,))


def test_sampled_views_keep_their_ranges_and_never_enter_the_box():
    settings = CameraSettings()
    views = sampled()
    assert (views.position.abs().amax(1) > 1).all()
    for got, (low, high) in ((views.fov_deg, settings.fov_deg), (views.elevation_deg, settings.elevation_deg)):
        assert low <= got.min() and got.max() <= high
        assert got.max() - got.min() > 0.98 * (high - low)
    distance = views.light.norm(dim=-1)
    assert settings.light_distance[0] - 1e-4 <= distance.min() and distance.max() <= settings.light_distance[1] + 1e-4


def test_sampled_azimuth_is_stratified_over_the_batch():
    azimuth = sampled(8, seed=5).azimuth_deg
    assert sorted((azimuth / 45).long().tolist()) == list(range(8))
    assert sampled(8, seed=6).azimuth_deg[0] != azimuth[0]


def test_named_angles_are_those_of_the_camera_up_to_the_jitter():
    exact = sampled(64, jitter_position=0, jitter_target=0, jitter_up=0)
    want = direction(exact.azimuth_deg, exact.elevation_deg)
    torch.testing.assert_close(torch.nn.functional.normalize(exact.position, dim=-1), want, atol=1e-5, rtol=0)
    loose = sampled(64)
    want = direction(loose.azimuth_deg, loose.elevation_deg)
    assert ((torch.nn.functional.normalize(loose.position, dim=-1) * want).sum(-1) > 0.995).all()


def test_area_uniform_elevation_is_uniform_in_its_sine():
    full = {"elevation_deg": (-10.0, 75.0)}
    by_area = torch.sin(torch.deg2rad(sampled(area_uniform=1.0, **full).elevation_deg))
    by_angle = sampled(area_uniform=0.0, **full).elevation_deg
    low, high = (math.sin(math.radians(e)) for e in full["elevation_deg"])
    assert by_area.mean().item() == pytest.approx((low + high) / 2, abs=0.02)
    assert by_angle.mean().item() == pytest.approx(32.5, abs=1.5)


def test_beta_elevation_has_betas_mean_and_distribution_function():
    share = (sampled(4096, elevation_beta=5.0, elevation_deg=(10.0, 60.0)).elevation_deg - 10) / 50
    assert share.mean().item() == pytest.approx(1 / 6, abs=0.01)
    for x in (0.1, 0.3):
        assert (share < x).float().mean().item() == pytest.approx(1 - (1 - x) ** 5, abs=0.03)
    plain = sampled(64, area_uniform=0.0)  # the draws are the same, so all else is
    assert torch.equal(sampled(64, area_uniform=0.0, elevation_beta=5.0).fov_deg, plain.fov_deg)


def test_views_are_a_function_of_the_generator():
    for name in ("c2w", "fov_deg", "azimuth_deg", "elevation_deg", "light"):
        assert torch.equal(getattr(sampled(4, seed=3), name), getattr(sampled(4, seed=3), name))


def test_light_comes_from_the_cameras_side():
    views = sampled(2048)
    towards = torch.nn.functional.normalize(views.light, dim=-1)
    camera = torch.nn.functional.normalize(views.position, dim=-1)
    assert ((towards * camera).sum(-1) > 0).float().mean() > 0.9


def test_indexing_keeps_the_batch_axis():
    views = orbit_views([0.0, 90.0, 180.0])
    assert len(views[1]) == 1 and views[1].azimuth_deg.item() == 90
    assert len(views[1:]) == 2 and len(views[torch.tensor([2, 0])]) == 2
    assert views[torch.tensor([2, 0])].azimuth_deg.tolist() == [180, 0]


def test_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="fov"):
        CameraSettings(fov=30)
