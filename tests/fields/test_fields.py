"""Field, background, occupancy and the object check: closed forms of the blob, normals against finite differences."""

import copy

import pytest
import torch

from stages.errors import UserError
from stages.fields.background import Background, BackgroundSettings, harmonics, random_background
from stages.fields.check import check_object, measure
from stages.fields.hashfield import FieldSettings, HashField
from stages.fields.occupancy import OccupancyGrid, OccupancySettings
from stages.kernels.srgb import linear_to_srgb
from stages.ramp import Ramp, constant

SETTINGS = FieldSettings(levels=6, log2_table=11, base=4, finest=24, hidden=16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rough_field(seed: int = 0, **changes) -> HashField:
    """A field whose table is large enough to bend the blob."""
    field = HashField(SETTINGS.model_copy(update=changes), generator(seed))
    with torch.no_grad():
        field.table.copy_(torch.randn(field.table.shape, generator=generator(seed + 1)))
    return field


def world(n: int, seed: int = 2) -> torch.Tensor:
    return 1.8 * torch.rand(n, 3, generator=generator(seed)) - 0.9


def test_fresh_field_is_the_cone_blob_in_mid_grey():
    field = HashField(SETTINGS, generator())
    points = world(200)
    raw = 10 * (1 - points.norm(dim=-1) / 0.5)
    sigma, normal, albedo = field.density_and_normal(points)
    assert torch.allclose(sigma, SETTINGS.density_scale * torch.nn.functional.softplus(raw), rtol=1e-2, atol=1e-3)
    assert torch.allclose(normal, points / points.norm(dim=-1, keepdim=True), atol=1e-2)  # outwards
    assert (albedo - 0.5).abs().max() < 1e-2


@pytest.mark.parametrize("bands", [constant(0.5), constant(1)])
def test_normal_is_minus_the_finite_difference_gradient_of_the_density(bands):
    field = rough_field(bands=bands).double()
    points = world(300).double()
    _, normal, _ = field.density_and_normal(points)
    step = 1e-6
    gradient = torch.stack(
        [(field.density(points + d) - field.density(points - d)) for d in step * torch.eye(3, dtype=torch.float64)], -1
    )
    numeric = -torch.nn.functional.normalize(gradient, dim=-1)
    cosine = (normal * numeric).sum(-1)
    assert (cosine > 1 - 1e-4).double().mean() > 0.99  # a few points sit within a step of a cell wall or ReLU kink


def test_float32_normals_and_densities_agree_with_float64():
    field = rough_field()
    points = world(500)
    fast = field.density_and_normal(points)
    slow = copy.deepcopy(field).double().density_and_normal(points.double())
    for a, b in zip(fast, slow, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-3, atol=1e-3)


def test_gradient_of_a_loss_on_normals_reaches_table_and_head_and_is_right():
    field = rough_field().double()
    points, target = world(50).double(), torch.randn(50, 3, generator=generator(9)).double()

    def loss() -> torch.Tensor:
        return (field.density_and_normal(points)[1] * target).sum()

    loss().backward()
    for parameter in (field.table, field.density_head.w1, field.density_head.w2):
        direction = torch.randn(parameter.shape, generator=generator(4), dtype=torch.float64)
        analytic = float((parameter.grad * direction).sum())
        with torch.no_grad():
            parameter += 1e-6 * direction
            up = float(loss())
            parameter -= 2e-6 * direction
            down = float(loss())
            parameter += 1e-6 * direction
        assert abs(analytic) > 1e-3
        assert analytic == pytest.approx((up - down) / 2e-6, rel=2e-2)
    assert field.albedo_head.w1.grad is None


def test_parts_agree_with_the_whole_and_known_features_change_nothing():
    field, points = rough_field(), world(100)
    sigma, albedo = field(points)
    features = field.features(points)
    torch.testing.assert_close((sigma, albedo), (field.density(points), field.albedo(points)))
    assert torch.equal(field.density(points), field.density(points, field.features(points, known=features)))
    normal_sigma, _, normal_albedo = field.density_and_normal(points, features.detach())
    assert torch.allclose(sigma, normal_sigma) and torch.allclose(albedo, normal_albedo)


def test_the_whole_has_the_gradients_of_its_parts():
    field, points = rough_field(), world(200)
    parameters = list(field.parameters())
    g = torch.randn(200, 4, generator=generator())

    def gradients(sigma, albedo):
        return torch.autograd.grad((sigma * g[:, 0]).sum() + (albedo * g[:, 1:]).sum(), parameters)

    features = field.features(points)
    parts = gradients(field.density(points, features), field.albedo(points, features))
    for whole, part in zip(gradients(*field(points)), parts, strict=True):
        torch.testing.assert_close(whole, part)


def test_levels_fade_in_with_progress():
    field, points = rough_field(bands=Ramp(1 / 3, 1.0, 0.0, 0.5)), world(50)
    calls = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        field.set_progress(progress)
        calls.append(field.density(points))
    assert field.bands.min() == 1 and torch.equal(calls[2], calls[3])
    assert not torch.equal(calls[0], calls[1]) and not torch.equal(calls[1], calls[2])
    field.set_progress(0.0)
    assert field.bands.tolist() == [1.0] * 4 + [0.0] * 8
    with torch.no_grad():
        field.table[field.spec.offsets[2] :] += 1  # levels that are off
    assert torch.equal(field.density(points), calls[0])


def test_detail_keeps_the_colours_until_trained_and_then_can_refine_them():
    field, points = rough_field(), world(400)
    before, sigma = field.albedo(points).detach(), field.density(points).detach()
    field.add_detail(generator(), levels=2, log2_table=10, finest=96)
    assert torch.allclose(field.albedo(points), before, atol=1e-6)
    target = (torch.sin(40 * points) > 0).float()
    optimiser = torch.optim.Adam(field.albedo_parameters(), lr=0.02)
    errors = []
    for _ in range(60):
        loss = (field.albedo(points) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(float(loss.detach()))
    assert errors[-1] < 0.3 * errors[0]
    assert field.detail.grad.abs().max() > 0
    assert sigma.shape == field.density(points).shape  # density still answers
    with pytest.raises(ValueError, match="detail"):
        field.add_detail(generator())


def test_field_is_a_function_of_its_generator():
    a, b, c = (HashField(SETTINGS, generator(s)) for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.table, c.table)


def test_harmonics_are_orthogonal_over_the_sphere():
    directions = torch.nn.functional.normalize(torch.randn(200_000, 3, generator=generator()), dim=-1)
    basis = harmonics(directions)
    gram = basis.T @ basis / len(basis)
    scale = gram.diagonal().sqrt()
    correlation = gram / scale[:, None] / scale
    assert (correlation - torch.eye(16)).abs().max() < 0.02


def test_environment_starts_near_mid_grey_and_random_backgrounds_stay_in_their_range():
    directions = torch.nn.functional.normalize(torch.randn(500, 3, generator=generator()), dim=-1)
    assert (Background(BackgroundSettings(), generator())(directions) - 0.5).abs().max() < 0.15
    settings = BackgroundSettings(random_probability=0.5, grey=(0.4, 0.9), tint=0.02)
    g = generator(3)
    draws = [random_background(settings, 4, g) for _ in range(200)]
    flat = torch.cat([d for d in draws if d is not None])
    assert 70 < sum(d is None for d in draws) < 130
    srgb = linear_to_srgb(flat.reshape(-1, 3))
    assert srgb.min() > 0.37 and srgb.max() < 0.93 and (srgb.amax(1) - srgb.amin(1)).max() < 0.041
    assert srgb.mean(1).std() > 0.1  # views of one step differ


def ball(radius: float, density: float = 40.0):
    return lambda points: density * (points.norm(dim=-1) < radius).float()


def test_occupancy_keeps_a_ball_and_its_surroundings_and_forgets_one_that_went():
    grid = OccupancyGrid(OccupancySettings(resolution=32, every=2, warmup=0.1, decay=0.5))
    assert grid.share == 1  # nothing is skipped before the first look
    g = generator()
    grid.update(ball(0.5), 0, 0.0, g, 0.03)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    centres = torch.cartesian_prod(axis, axis, axis).reshape(32, 32, 32, 3).norm(dim=-1)
    assert grid.cells[centres < 0.5].all() and not grid.cells[centres > 0.5 + 2.5 / 16 * 1.74].any()
    state = g.get_state()
    grid.update(ball(0.5), 1, 1 / 40, g, 0.03)  # not a multiple of `every`
    assert torch.equal(state, g.get_state())
    for step in range(2, 40):
        grid.update(ball(0.2), step, step / 40, g, 0.03)
    assert not grid.cells[centres > 0.2 + 2.5 / 16 * 1.74].any() and grid.cells[centres < 0.2].all()
    assert not grid.cells[-1].any()


def test_occupancy_finds_matter_that_appears_after_the_warm_up():
    grid = OccupancyGrid(OccupancySettings(resolution=32, every=1, warmup=0.025, share=0.25))
    g = generator()
    for step in range(8):
        grid.update(ball(0.2), step, step / 40, g, 0.03)
    for step in range(8, 28):
        grid.update(lambda p: ball(0.2)(p) + ball(0.3)(p - 0.6), step, step / 40, g, 0.03)
    centre = round((0.6 + 1) * 16)
    assert grid.cells[centre, centre, centre]


def test_thin_cells_are_the_ones_of_low_density_and_the_surroundings():
    grid = OccupancyGrid(OccupancySettings(resolution=32, threshold=0.01, thin=0.1))
    grid.update(lambda p: ball(0.3, 40.0)(p) + ball(0.6, 1.0)(p), 0, 0.0, generator(), 0.03)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    centres = torch.cartesian_prod(axis, axis, axis).reshape(32, 32, 32, 3).norm(dim=-1)
    assert (grid.cells[centres < 0.2] == 1).all() and (grid.cells[(centres > 0.4) & (centres < 0.5)] == 2).all()
    assert not grid.cells[centres > 0.6 + 2.5 / 16 * 1.74].any()


def test_thin_fog_everywhere_is_not_skipped_as_a_whole():
    grid = OccupancyGrid(OccupancySettings(resolution=16))
    grid.update(lambda p: 1e-3 * (1 + (p[:, 0] > 0).float()), 0, 0.0, generator(), 0.03)
    assert grid.share > 0.4


def test_measure_of_a_ball():
    p = measure(ball(0.5))
    assert p.volume == pytest.approx(0.5236 / 8, rel=0.03) and p.cover == pytest.approx(0.785 / 4, rel=0.05)
    assert p.faces == 0 and p.peak == 40 and p.finite == 1
    check_object(ball(0.5))


@pytest.mark.parametrize(
    ("density", "what"),
    [
        (lambda p: torch.zeros(len(p)), "empty box"),
        (lambda p: torch.where(p[:, 0] > 0.9, torch.nan, ball(0.5)(p)), "broken field"),
        (lambda p: torch.full((len(p),), 30.0), "filled its box"),
        (lambda p: 30.0 * (p[:, 1] < -0.3), "filled its box"),
        (lambda p: 2.0 * (p.norm(dim=-1) < 0.8), "fog"),
    ],
)
def test_what_is_not_an_object_is_refused_with_advice(density, what):
    with pytest.raises(UserError) as error:
        check_object(density)
    assert what in error.value.what and error.value.why and "coarse." in error.value.fix
