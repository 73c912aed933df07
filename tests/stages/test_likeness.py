"""The object that a prior knows, stretched to a picture: which sizes come back, what one view cannot tell stays."""

from __future__ import annotations

import pytest
import torch

from stages.cameras import orbit_views, rays
from stages.guidance.guidance import Guidance, GuidanceSettings
from stages.likeness import fit_warp, liken
from stages.picture import Picture, PictureSettings
from stages.prompts import ViewPrompts
from tests.guidance.gaussian_prior import GaussianPrior

CPU = torch.device("cpu")


def block(half):
    """A soft box with sides of 2 half, red above and blue below."""

    def radiance(points):
        outside = (points.abs() - torch.tensor(half)).amax(-1)
        red, blue = torch.tensor([0.7, 0.05, 0.05]), torch.tensor([0.05, 0.05, 0.6])
        share = torch.sigmoid(40 * points[:, 1:2])
        return 60 * torch.sigmoid(-60 * outside), share * red + (1 - share) * blue

    return radiance


def picture_of(half, azimuth=25.0, elevation=15.0, side=96) -> Picture:
    """The picture of a block, by thin slices."""
    settings = PictureSettings(azimuth_deg=azimuth, elevation_deg=elevation)
    rays_o, rays_d = (r[0] for r in rays(orbit_views([azimuth], elevation), side, side))
    t = torch.linspace(1.8, 4.2, 160)
    density, albedo = block(half)((rays_o[..., None, :] + t[:, None] * rays_d[..., None, :]).view(-1, 3))
    alpha = 1 - torch.exp(-density.view(side, side, -1) * (t[1] - t[0]))
    passed = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha[..., :-1]], -1), -1)
    weights = (passed * alpha)[..., None]
    mask = weights.sum(-2)
    colour = (weights * albedo.view(side, side, -1, 3)).sum(-2) / mask.clamp_min(1e-3)
    return Picture(colour, mask, None, settings)


def sizes(warp):
    return (1 / torch.diagonal(warp)[:3]).tolist()


@pytest.mark.slow
def test_an_object_takes_the_height_and_the_width_of_its_picture_and_its_depth_goes_with_the_width():
    likeness = fit_warp(block((0.3, 0.3, 0.3)), picture_of((0.36, 0.42, 0.36)), CPU)
    assert likeness.iou > 0.95 > likeness.iou_before + 0.1
    x, y, z = sizes(likeness.warp)
    assert y == pytest.approx(1.4, abs=0.08) and x == pytest.approx(1.2, abs=0.06) and z == pytest.approx(x, abs=0.06)


@pytest.mark.slow
def test_an_object_that_is_the_pictures_stays_as_it_is_known():
    likeness = fit_warp(block((0.4, 0.3, 0.35)), picture_of((0.4, 0.3, 0.35)), CPU)
    assert sizes(likeness.warp) == pytest.approx([1, 1, 1], abs=0.03)
    assert likeness.warp[:3, 3].abs().max() < 0.02 and likeness.iou > 0.95


class Knowing(GaussianPrior):
    """A prior that knows a block in 3D and keeps the views that it is asked about."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def predict_noise(self, z_t, t, embedding, context):
        self.asked.append(context.views)
        return super().predict_noise(z_t, t, embedding, context)

    def shape(self, embedding):
        return block((0.3, 0.3, 0.3))


def guidance(prior) -> Guidance:
    return Guidance(prior, GuidanceSettings(), ViewPrompts("a block"), torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_a_likened_guidance_shows_its_prior_the_views_of_the_object_that_it_knows():
    prior, views = Knowing(), orbit_views([70.0], 10.0)
    guide = guidance(prior)
    likeness = liken(guide, picture_of((0.36, 0.42, 0.36)), CPU)
    guide(torch.full((1, 8, 8, 3), 0.5), views, 0.5)
    (seen,) = {id(views): views for views in prior.asked}.values()
    points = torch.rand(50, 3) - 0.5
    inside = points @ likeness.warp[:3, :3].T + likeness.warp[:3, 3]
    assert torch.allclose(guide.shape()(points)[0], prior.shape(None)(inside)[0], atol=1e-4)
    # a ray of a view, taken to the object, is the same pixel's ray of the view that the prior is shown
    (o, d), (seen_o, seen_d) = rays(views, 8, 8), rays(seen, 8, 8)
    there = (o + 2.5 * d) @ likeness.warp[:3, :3].T + likeness.warp[:3, 3]
    assert torch.allclose(torch.linalg.cross(there - seen_o, seen_d), torch.zeros(()), atol=1e-5)


def test_nothing_is_done_without_a_picture_or_to_a_prior_that_knows_pictures_only():
    picture, prior = picture_of((0.4, 0.3, 0.35), side=16), GaussianPrior()
    assert liken(None, picture, CPU) is None and liken(guidance(Knowing()), None, CPU) is None
    assert liken(guidance(prior), picture, CPU) is None


def test_views_go_through_a_warp_with_their_lights():
    warp = torch.diag(torch.tensor([1.1, 0.9, 1.0, 1.0]))
    views = orbit_views([10.0, 50.0], 20.0)
    assert torch.allclose(views.through(torch.eye(4)).c2w, views.c2w)
    moved = views.through(warp)
    assert torch.allclose(moved.light, views.light * torch.tensor([1.1, 0.9, 1.0]))
    assert torch.allclose(moved.position, views.position * torch.tensor([1.1, 0.9, 1.0]))
