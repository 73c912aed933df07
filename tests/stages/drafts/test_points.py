"""Point clouds: the transformer's symmetry, schedules and sampler against closed forms, distances, pictures, PLY."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import trimesh

from pipeline.output.ply import cloud_bytes
from stages.cameras import orbit_views
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.cloud import Cloud
from stages.points.cloud import REACH, NearestColours, channels_of, cloud_of
from stages.points.diffusion import add_noise, churned, cosine, guided, heun, ladder, linear, step_of, v_of
from stages.points.draw import draw_cloud
from stages.points.model import Condition, PointModel
from stages.points.surface import density_of, distance_grid
from stages.points.transformer import PointTransformer, SdfNetwork, SdfShape, TransformerShape
from tests.stages.drafts.points_cases import BallDistance, ball_cloud, loud, tiny_sizes

SHAPE = TransformerShape(16, 2, 2, 6, 5, low=True)


def told(batch: int = 2) -> tuple[torch.Tensor, ...]:
    return torch.rand(batch) * 1000, torch.randn(batch, 6), torch.randn(batch, 4, 5), torch.randn(batch, 7, 6)


def test_permuting_points_permutes_their_noise_and_permuting_low_ones_changes_nothing():
    net, points, (t, vector, grid, low) = loud(PointTransformer(SHAPE)).double(), torch.randn(2, 9, 6), told()
    points, t, vector, grid, low = (x.double() for x in (points, t, vector, grid, low))
    order, other = torch.randperm(9), torch.randperm(7)
    out = net(points, t, vector, grid, low)
    torch.testing.assert_close(net(points[:, order], t, vector, grid, low[:, other]), out[:, order])
    assert not torch.allclose(out, out[:, order])


def test_a_new_network_predicts_no_noise_and_a_louder_one_hears_all_it_is_told():
    net, points, conditions = PointTransformer(SHAPE), torch.randn(2, 9, 6), told()
    assert (net(points, *conditions) == 0).all()
    loud(net)
    before = net(points, *conditions)
    for k in range(4):
        changed = [part + torch.rand_like(part) if k == j else part for j, part in enumerate(conditions)]
        assert not torch.allclose(net(points, *changed), before, atol=1e-4)


def test_distances_are_asked_each_for_itself_and_do_not_depend_on_the_points_order():
    net = loud(SdfNetwork(SdfShape(16, 2, 1, 2))).double()
    points, queries = torch.randn(1, 12, 3).double(), torch.randn(1, 5, 3).double()
    whole = net(net.encode(points), queries)
    torch.testing.assert_close(net(net.encode(points[:, torch.randperm(12)]), queries[:, 2:3]), whole[:, 2:3])
    assert whole.std() > 0


@pytest.mark.parametrize("schedule", [cosine, linear])
def test_schedules_fall_and_their_steps_are_found_by_their_noise(schedule):
    alpha_bar = schedule()
    assert len(alpha_bar) == 1024 and (alpha_bar.diff() < 0).all() and alpha_bar[0] > 0.99 and alpha_bar[-1] < 1e-4
    for t in (0, 10, 511.5, 900):
        low, high = alpha_bar[math.floor(t)], alpha_bar[math.ceil(t)]
        sigma = ((1 - low) / low * (1 - high) / high) ** 0.25  # the mean of the logarithms
        assert abs(step_of(float(sigma), alpha_bar) - t) < 1e-6
    assert step_of(1e-9, alpha_bar) == 0 and step_of(1e9, alpha_bar) == 1023


def test_cosine_is_its_formula_until_betas_are_capped():
    alpha_bar, t = cosine(), torch.arange(1, 1000, dtype=torch.float64) / 1024
    truth = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square() / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(alpha_bar[:999], truth)


def test_ladder_is_karras_and_ends_at_nothing():
    levels = ladder(5, 120.0)
    assert levels[0] == pytest.approx(120) and levels[4] == pytest.approx(1e-3) and levels[5] == 0
    assert levels[2] == pytest.approx(((120 ** (1 / 7) + 1e-3 ** (1 / 7)) / 2) ** 7)


def gaussian(mu: float, s: float):
    """E[x0 | x] where x0 is N(mu, s^2)."""
    return lambda x, sigma: mu + s**2 / (s**2 + sigma**2) * (x - mu)


def test_heun_follows_its_closed_form_on_a_gaussian_in_second_order():
    """Data N(mu, s^2): the flow keeps (x - mu) / sqrt(s^2 + sigma^2)."""
    mu, s, start = 0.3, 0.5, torch.tensor([[[-150.0], [40.0], [200.0]]], dtype=torch.float64)
    truth = mu + (start - mu) * s / math.sqrt(s**2 + 120.0**2)
    errors = []
    for steps in (32, 64, 128):
        x = start
        for sigma, after in pairwise(ladder(steps, 120.0)):
            x, x0 = heun(x, sigma, after, gaussian(mu, s))
        assert torch.equal(x, x0)
        errors.append(float((x - truth).abs().max()))
    assert errors[2] < 2e-3 and 3 < errors[0] / errors[1] < 6 and 3 < errors[1] / errors[2] < 6


def test_churned_sampling_ends_with_the_gaussians_moments():
    mu, s, generator = 0.3, 0.5, torch.Generator().manual_seed(0)
    x = 120 * torch.randn(1, 40_000, 1, generator=generator, dtype=torch.float64)
    for sigma, after in pairwise(ladder(80, 120.0)):
        x, sigma = churned(x, sigma, 0.1, generator)
        x, _ = heun(x, sigma, after, gaussian(mu, s))
    assert abs(float(x.mean()) - mu) < 0.01 and abs(float(x.std()) - s) < 0.01


def test_churn_adds_the_noise_that_it_says_and_none_at_nothing():
    x, level = churned(torch.zeros(1, 50_000, 1), 2.0, 0.25, torch.Generator().manual_seed(0))
    assert level == 2.5 and abs(float(x.std()) - 1.5) < 0.02
    same, level = churned(x, 2.0, 0.0, torch.Generator())
    assert same is x and level == 2.0
    assert churned(x, 1.0, 9.0, torch.Generator())[1] == pytest.approx(math.sqrt(2))


def test_clean_clouds_are_found_under_noise_by_the_velocity():
    """A network that predicts the true v, guided or not, gives the clean cloud; scale 0 gives the untold one."""
    model, x0, eps = PointModel(tiny_sizes()), ball_cloud(64), torch.randn(1, 64, 6)
    condition, sigma = Condition(torch.ones(1, 96), torch.ones(1, 3, 144)), 0.7

    def network(z_t, t, vector, grid, low):
        alpha_bar = torch.tensor(1 / (1 + sigma**2))
        torch.testing.assert_close(z_t[:1], add_noise(x0, eps, alpha_bar[None]), atol=1e-5, rtol=0)
        v = v_of(x0, eps, alpha_bar[None])
        return torch.where((vector.abs().sum(-1) > 0)[:, None, None], v, v + 0.1)

    model.base.forward = network
    x = x0 + sigma * eps
    torch.testing.assert_close(model.x0("base", x, sigma, condition), x0.clamp(-1, 1), atol=1e-5, rtol=0)
    untold = model.x0("base", x, sigma, condition, scale=0.0)
    lower = x0 - 0.1 * sigma / (1 + sigma**2) ** 0.5  # x0 = sqrt(alpha_bar) z_t - sqrt(1 - alpha_bar) v
    torch.testing.assert_close(untold, lower.clamp(-1, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(guided(x0, untold, 2.0), 2 * x0 - untold)


def test_channels_and_clouds_convert_into_each_other():
    points, colours = torch.rand(20, 3) - 0.5, torch.randint(0, 256, (20, 3)) / 255
    cloud = cloud_of(channels_of(points, colours))
    torch.testing.assert_close(cloud.points, points)
    torch.testing.assert_close(cloud.colours, colours)
    loudest = cloud_of(torch.tensor([[0.0, 0, 0, 1.4, -3, 0.2]])).colours
    assert loudest[0, 0] == 1 and loudest[0, 1] == 0


def test_surface_of_a_ball_is_where_it_is_and_colours_are_the_nearest_points():
    grid = distance_grid(BallDistance(), torch.zeros(2000, 3), 32)
    points = torch.tensor([[0.0, 0.0, 0.3], [0.46, 0.0, 0.0], [0.0, 0.54, 0.0], [0.0, 0.0, 0.95]])
    density = density_of(grid, points)
    assert (density[:2] > 70).all() and (density[2:] < 5).all()
    cloud = Cloud(torch.tensor([[0.0, 0, 1], [0, 0, -1]]), torch.tensor([[1.0, 0, 0], [0, 0.5, 0]]))
    colours = NearestColours(cloud)(torch.tensor([[0.3, 0.2, 0.1], [0.0, 0.0, -0.2]]))
    torch.testing.assert_close(colours, srgb_to_linear(cloud.colours))


def test_grid_is_asked_finely_beside_the_surface_and_axes_are_in_order():
    class Slab(BallDistance):
        asked = 0

        def forward(self, code, queries):
            self.asked += queries.shape[1]
            return queries[..., 0] + 2 * queries[..., 1] - 0.1

    network = Slab()
    grid = distance_grid(network, torch.zeros(4, 3), 32)
    assert 16**3 < network.asked < 16**3 + 32**3 // 2
    axis = torch.linspace(-0.9, 0.9, 32)
    truth = axis[:, None, None] + 2 * axis[:, None] - 0.1 * REACH
    torch.testing.assert_close(grid, truth.expand(32, 32, 32), atol=1e-5, rtol=0)


def test_network_that_finds_no_surface_gets_one():
    class Outside(BallDistance):
        def forward(self, code, queries):
            return super().forward(code, queries) + 5

    grid = distance_grid(Outside(), torch.zeros(4, 3), 16)
    assert (grid < 0).any() and (grid > 0).any()


def test_drawn_cloud_shows_the_nearest_points_where_they_are():
    points = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.4], [0.5, 0.5, 0.0]])
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    (picture,) = draw_cloud(Cloud(points, colours), orbit_views([0.0], 0.0), 80, backdrop=0.25)
    torch.testing.assert_close(picture[40, 40], colours[1])
    reach = 0.5 / (3 * math.tan(math.radians(18)))
    row, column = int(40 - 40 * reach), int(40 + 40 * reach)
    torch.testing.assert_close(picture[row, column], colours[2])
    assert (picture[0, 0] == 0.25).all() and not (picture == colours[0]).all(-1).any()


def test_cloud_leaves_as_ply_that_another_program_reads():
    cloud = Cloud(torch.rand(30, 3) - 0.5, torch.randint(0, 256, (30, 3)) / 255)
    read = trimesh.load(io.BytesIO(cloud_bytes(cloud)), file_type="ply")
    assert isinstance(read, trimesh.PointCloud)
    np.testing.assert_allclose(read.vertices, cloud.points.numpy(), atol=1e-6)
    assert np.array_equal(read.colors[:, :3], (255 * cloud.colours).round().numpy())
