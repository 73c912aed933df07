"""Volume rendering against closed forms and against itself without shortcuts."""

import math

import pytest
import torch

from stages.cameras import CameraSettings, orbit_views, sample_views
from stages.fields.hashfield import FieldSettings, HashField
from stages.render.shade import ALBEDO, LAMBERT, Shading
from stages.render.volume import Sampling, render_field

FULL = torch.ones(8, 8, 8, dtype=torch.uint8)


class Ball:
    """A uniform ball with albedo by position and outward normals, met through the renderer's protocol."""

    def __init__(self, radius: float, sigma: float) -> None:
        self.radius, self.sigma = radius, sigma

    def features(self, points, known=None):
        return torch.zeros(len(points), 0)

    def density(self, points, features=None):
        return self.sigma * (points.norm(dim=-1) < self.radius).float()

    def forward(self, points, features=None):
        return self.density(points), self.albedo(points)

    def albedo(self, points):
        return 0.5 + 0.5 * points.sign()

    def density_and_normal(self, points, features=None):
        return self.density(points), torch.nn.functional.normalize(points, dim=-1), self.albedo(points)


def field(seed: int = 0) -> HashField:
    g = torch.Generator().manual_seed(seed)
    f = HashField(FieldSettings(levels=6, log2_table=11, base=4, finest=24, hidden=16), g)
    with torch.no_grad():
        f.table.copy_(0.5 * torch.randn(f.table.shape, generator=g))
    return f


def test_opaque_ball_shows_its_facing_octants_over_the_background():
    images = render_field(Ball(0.6, 500.0), torch.tensor([0.2, 0.3, 0.4]), FULL, orbit_views([0.0], 0.0), 32, 32)
    assert images.colour.shape == (1, 32, 32, 3) and images.opacity.shape == (1, 32, 32, 1)
    assert torch.allclose(images.colour[0, 0, 0], torch.tensor([0.2, 0.3, 0.4]))
    # seen from +z: x to the right, y up, so the upper right octant is white and the lower left one blue
    assert torch.allclose(images.colour[0, 10, 21], torch.ones(3), atol=1e-3)
    assert torch.allclose(images.colour[0, 21, 10], torch.tensor([0.0, 0.0, 1.0]), atol=1e-3)
    radius = 16 * math.tan(math.asin(0.6 / 3)) / math.tan(math.radians(18))  # silhouette in pixels
    assert float(images.opacity.sum()) == pytest.approx(math.pi * radius**2, rel=0.03)
    assert float(images.depth[0, 16, 16]) == pytest.approx(2.4, abs=0.03)


def test_transparent_ball_absorbs_by_the_chord():
    sigma = 1.3
    images = render_field(
        Ball(0.6, sigma), torch.ones(3), FULL, orbit_views([30.0], 20.0), 33, 33, sampling=Sampling(0.005)
    )
    assert float(images.opacity[0, 16, 16]) == pytest.approx(1 - math.exp(-sigma * 1.2), abs=0.01)


def test_shaded_ball_is_lambert_and_its_normals_face_the_camera():
    views = orbit_views([0.0], 0.0)
    shading = Shading(ambient=0.2, diffuse=0.8, textureless=True)
    images = render_field(
        Ball(0.6, 2000.0), torch.zeros(3), FULL, views, 33, 33, shading=shading, sampling=Sampling(0.002)
    )
    assert torch.allclose(images.normal[0, 16, 16], torch.tensor([0.0, 0.0, 1.0]), atol=0.01)
    surface = torch.tensor([0.0, 0.0, 0.6])
    to_light = torch.nn.functional.normalize(views.light[0] - surface, dim=-1)
    expected = 0.8 * (0.2 + 0.8 * float(to_light[2]))
    assert torch.allclose(images.colour[0, 16, 16], torch.full((3,), expected), atol=0.01)
    assert float(images.orientation) < 1e-4  # all visible normals face the camera


def test_orientation_penalises_normals_that_face_away():
    ball = Ball(0.6, 500.0)
    ball.density_and_normal = lambda p, f=None: (ball.density(p), -torch.nn.functional.normalize(p, dim=-1), p)
    images = render_field(ball, torch.zeros(3), FULL, orbit_views([0.0], 0.0), 24, 24, normals=True)
    assert float(images.orientation) > 0.3  # mean of cos^2 over a disc is 1/2


def test_skipping_and_early_stop_change_nothing_that_can_be_seen():
    f, views = field(), orbit_views([20.0, 200.0], 30.0)
    cells = torch.zeros(32, 32, 32, dtype=torch.uint8)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    cells[(f.density(torch.cartesian_prod(axis, axis, axis)) > 1e-3).reshape(32, 32, 32)] = 1
    with torch.no_grad():
        exact = render_field(
            f, torch.ones(3), FULL, views, 24, 24, sampling=Sampling(early_stop=0.0, min_optical_depth=0.0)
        )
        fast = render_field(f, torch.ones(3), cells, views, 24, 24, sampling=Sampling(early_stop=1e-3))
    assert fast.samples < 0.7 * exact.samples
    difference = (exact.colour - fast.colour).abs()
    assert difference.max() < 1.5e-2 and difference.mean() < 1e-3  # the maximum: thirty faint samples in a row


def test_gradients_with_and_without_shortcuts_agree():
    views = orbit_views([20.0, 120.0], 30.0)
    gradients = []
    for cut in (0.0, 1e-5):
        f = field()
        images = render_field(
            f,
            torch.ones(3),
            FULL,
            views,
            16,
            16,
            shading=LAMBERT,
            sampling=Sampling(early_stop=cut, min_optical_depth=cut),
            normals=True,
        )
        (images.colour.square().mean() + images.orientation + images.opacity.mean()).backward()
        gradients.append(f.table.grad)
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[0].norm()


def test_background_function_gets_gradient_where_the_object_is_not():
    class Sky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.colour = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))

        def forward(self, directions):
            return self.colour.expand_as(directions)

    sky = Sky()
    images = render_field(Ball(0.6, 500.0), sky, FULL, orbit_views([0.0], 0.0), 16, 16)
    images.colour.sum().backward()
    assert torch.allclose(sky.colour.grad, (1 - images.opacity).sum().expand(3))
    assert images.backdrop.shape == (1, 16, 16, 3)


def test_an_empty_grid_renders_the_background_alone():
    f = field()
    views = orbit_views([0.0, 90.0], 10.0)
    images = render_field(f, torch.full((2, 1, 1, 3), 0.7), 0 * FULL, views, 8, 8, shading=LAMBERT)
    assert images.samples == 0 and torch.equal(images.colour, torch.full((2, 8, 8, 3), 0.7))
    images.colour.sum().backward()


def test_jitter_comes_from_the_generator_alone():
    f = field()
    views = sample_views(CameraSettings(), 2, torch.Generator().manual_seed(0))

    def render(seed):
        g = None if seed is None else torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return render_field(f, torch.ones(3), FULL, views, 12, 12, shading=ALBEDO, generator=g).colour

    assert torch.equal(render(1), render(1)) and not torch.equal(render(1), render(2))
    assert torch.equal(render(None), render(None))
    assert (render(1) - render(None)).abs().mean() < 0.05
