"""Tri-planes: their roll-out, the 3D-aware convolution, the field and the sampler, each against its definition."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from stages.cameras import orbit_views
from stages.render.shade import ALBEDO, LAMBERT
from stages.triplane.diffusion import add_noise, cosine, next_noise, sigmoid, times, v_of, x0_of_v
from stages.triplane.draw import draw, occupied
from stages.triplane.field import Decoder, TriplaneField
from stages.triplane.planes import AXES, BOX, features_at, resize, roll_out, roll_up
from stages.triplane.unet import AwareConvolution, TriplaneUNet, UNetShape
from tests.stages.drafts.triplane_cases import ball_decoder, ball_planes


def test_roll_out_and_back_is_exact():
    planes = torch.randn(2, 3, 4, 5, 5)
    rolled = roll_out(planes)
    assert rolled.shape == (2, 4, 5, 15) and torch.equal(rolled[..., 5:10], planes[:, 1])
    assert torch.equal(roll_up(rolled), planes)
    with pytest.raises(ValueError, match=r"wanted \[B, C, R, 3 R\]"):
        roll_up(rolled[..., 1:])


def ramps(side: int) -> torch.Tensor:
    """Planes [1, 3, 3, R, R] whose channels are x, y and z at the cells' centres; none where a plane lacks the axis."""
    axis = (torch.arange(side) + 0.5) * (2 * BOX / side) - BOX
    planes = torch.zeros(1, 3, 3, side, side)
    for plane, (column, row) in enumerate(AXES):
        planes[0, plane, column], planes[0, plane, row] = axis[None, :], axis[:, None]
    return planes


def test_features_of_ramps_are_the_points():
    """Each axis lies in two of the planes, and a bilinear sample of a ramp is exact between the cells' centres."""
    points = torch.rand(1, 50, 3) * 1.6 - 0.8
    torch.testing.assert_close(features_at(ramps(32), points), 2 * points, atol=1e-5, rtol=0)


def test_half_sized_planes_hold_the_means_of_cells():
    planes = torch.randn(1, 3, 2, 8, 8)
    torch.testing.assert_close(resize(planes, 4)[0, 1, 0, 2, 3], planes[0, 1, 0, 4:6, 6:8].mean())
    points = torch.rand(1, 50, 3) * 1.2 - 0.6
    torch.testing.assert_close(features_at(resize(ramps(64), 32), points), 2 * points, atol=1e-5, rtol=0)


def aware_by_formula(layer: AwareConvolution, rolled: torch.Tensor) -> torch.Tensor:
    """The definition: A' = conv[A, col(B), col(C)^T], B' = conv[col(A), B, row(C)], C' = conv[row(A)^T, row(B), C]."""
    a, b, c = rolled.chunk(3, -1)

    def col(p):
        return p.mean(-2, keepdim=True).expand_as(p)

    def row(p):
        return p.mean(-1, keepdim=True).expand_as(p)

    sides = [a, col(b), col(c).mT], [col(a), b, row(c)], [row(a).mT, row(b), c]
    parts = zip(sides, layer.weight, layer.bias, strict=True)
    return torch.cat([F.conv2d(torch.cat(s, 1), weight, bias, padding=1) for s, weight, bias in parts], -1)


@pytest.mark.parametrize("side", [2, 3, 8])
def test_aware_convolution_is_its_formula_in_value_and_gradient(side):
    layer = AwareConvolution(3, 4).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    rolled = torch.randn(2, 3, side, 3 * side, dtype=torch.float64, requires_grad=True)
    truth = aware_by_formula(layer, rolled)
    torch.testing.assert_close(layer(rolled), truth)
    upward = torch.randn_like(truth)
    inputs = [rolled, *layer.parameters()]
    mine, theirs = (
        torch.autograd.grad(out, inputs, upward) for out in (layer(rolled), aware_by_formula(layer, rolled))
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_aware_convolution_of_ramps_hands_each_plane_what_the_others_know_of_its_axes():
    """Only the middle taps: each plane gets a column's x from another, never what lies along the axis it lacks."""
    layer = AwareConvolution(3, 9)
    with torch.no_grad():
        for plane in range(3):
            layer.weight[plane, torch.arange(9), torch.arange(9), 1, 1] = 1.0
    planes = ramps(8)
    picture = roll_up(layer(roll_out(planes)))[0]  # [3 planes, 9, 8, 8]
    for plane, (column, row) in enumerate(AXES):
        for source, (other_column, other_row) in enumerate(AXES):
            for axis in range(3):
                value = picture[plane, 3 * source + axis]
                has_axis = axis in (column, row) and axis in (other_column, other_row)
                truth = planes[0, plane, axis] if has_axis else torch.zeros(8, 8)
                torch.testing.assert_close(value, truth, atol=1e-6, rtol=0)


def test_a_plane_does_not_leak_over_its_border_in_the_aware_convolution():
    """Where the three planes meet in the roll-out, an ordinary convolution mixes cells that are far apart in space."""
    layer, ordinary = AwareConvolution(1, 1), torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight[:, :, :, :, :] = 0
        for plane in range(3):
            layer.weight[plane, 0, plane] = 1.0
        ordinary.weight.fill_(1.0)
    rolled = torch.zeros(1, 1, 4, 12)
    rolled[..., 1, 4] = 1  # first column of XZ
    assert layer(rolled)[0, 0, :, :4].abs().max() == 0 and ordinary(rolled)[0, 0, :, :4].abs().max() == 1


def test_a_new_network_predicts_nothing_and_hears_words_only_where_they_are():
    torch.manual_seed(0)
    net = TriplaneUNet(UNetShape(8, 2, 2, 2, (8, 16), 1, (1,), condition=6, words=5))
    x, t = torch.randn(2, 2, 8, 24), torch.rand(2)
    vector, words, mask = torch.randn(2, 6), torch.randn(2, 4, 5), torch.zeros(2, 4, dtype=torch.bool)
    assert (net(x, t, vector, words, mask) == 0).all()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    silent = net(x, t, vector, words, mask)
    assert torch.equal(silent, net(x, t, vector, words + 1, mask))
    mask[0, 1] = True
    louder = net(x, t, vector, words, mask)
    assert not torch.equal(louder[0], silent[0]) and torch.allclose(louder[1], silent[1], atol=1e-5)


def test_predictions_convert_into_each_other():
    x0, eps, alpha_bar = torch.randn(4, 2, 3, 9), torch.randn(4, 2, 3, 9), cosine(torch.tensor([0.0, 0.2, 0.6, 0.95]))
    z_t = add_noise(x0, eps, alpha_bar)
    torch.testing.assert_close(x0_of_v(v_of(x0, eps, alpha_bar), z_t, alpha_bar), x0)


@pytest.mark.parametrize("schedule", [cosine, sigmoid])
def test_schedules_fall_from_signal_to_noise(schedule):
    values = schedule(torch.linspace(0, 1, 101))
    assert (values.diff() <= 0).all() and values[0] > 0.99 and values[-1] < 1e-3


@pytest.mark.parametrize("schedule", [cosine, sigmoid])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sampler_reaches_its_closed_form_on_a_gaussian(schedule, eta):
    """Data N(mu, s^2): x0 is predicted exactly, so each step maps a Gaussian to a Gaussian whose moments are known."""
    mu, s, steps = 1.5, 0.4, 40
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(1, 40_000, generator=generator, dtype=torch.float64)
    mean, variance, ladder = 0.0, 1.0, times(steps)
    for t, later in pairwise(ladder):
        now, then = schedule(torch.tensor([t, later])).tolist()
        gain = math.sqrt(now) * s**2 / (now * s**2 + 1 - now)  # of z_t in E[x0 | z_t]
        x0 = mu + gain * (z - math.sqrt(now) * mu)
        z = next_noise(z, x0, t, later, schedule, eta, generator)
        sigma = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        on_eps = math.sqrt(max(0.0, 1 - then - sigma**2)) / math.sqrt(1 - now)
        first, then_root = 1 - gain * math.sqrt(now), math.sqrt(then)
        factor = then_root * gain + on_eps * (1 - math.sqrt(now) * gain)
        shift = (then_root - on_eps * math.sqrt(now)) * first * mu
        if later == 0:
            factor, shift, sigma = gain, first * mu, 0.0
        mean, variance = shift + factor * mean, factor**2 * variance + sigma**2
    assert abs(float(z.mean()) - mean) < 0.01 and abs(float(z.std()) - math.sqrt(variance)) < 0.01
    assert abs(mean - mu) < 0.03 and 0.75 * s < math.sqrt(variance) < 1.05 * s


def test_field_of_a_ball_has_its_density_colour_and_normals():
    field = TriplaneField(ball_planes()[0], ball_decoder())
    points = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.2, 0.1], [0.6, 0.2, 0.0], [0.0, -0.7, 0.0]])
    density = field.density(points)
    assert (density[:2] > 60).all() and (density[2:] < 20).all()
    sigma, normal, albedo = field.density_and_normal(points[1:])
    torch.testing.assert_close(sigma, density[1:])
    torch.testing.assert_close(normal, F.normalize(points[1:], dim=-1), atol=0.05, rtol=0)
    assert (albedo[:, 0] > albedo[:, 1]).all()
    assert field.density(torch.tensor([[0.95, 0.0, 0.0]])) == 0


def test_drawn_ball_covers_its_disc():
    field = TriplaneField(ball_planes()[0], ball_decoder())
    picture = draw(field, orbit_views([0.0, 120.0], 20.0), 48, torch.zeros(3))
    cover = picture.opacity.mean((1, 2, 3))
    disc = math.pi * (24 * math.tan(math.asin(0.5 / 3)) / math.tan(math.radians(18))) ** 2 / 48**2
    assert ((cover - disc).abs() < 0.15 * disc).all()


def test_what_lies_deep_inside_is_not_looked_into_and_not_missed():
    field, views = TriplaneField(ball_planes()[0], ball_decoder()), orbit_views([20.0, 140.0], 20.0)
    cells = occupied(field, torch.device("cpu"))
    whole = torch.ones_like(cells)
    assert cells[16, 16, 16] == 0 and cells.sum() < whole.sum() / 8
    for shading in (ALBEDO, LAMBERT):
        less, more = (draw(field, views, 32, torch.zeros(3), shading=shading, cells=c).colour for c in (cells, whole))
        assert float((less - more).detach().abs().max()) < 2e-3


def test_gradient_of_a_picture_reaches_the_planes():
    planes = ball_planes()[0].requires_grad_()
    picture = draw(TriplaneField(planes, ball_decoder()), orbit_views([30.0], 20.0), 16, torch.zeros(3))
    picture.colour.sum().backward()
    assert torch.isfinite(planes.grad).all() and planes.grad.abs().max() > 0


def test_decoder_tells_octaves_of_the_features():
    decoder = Decoder(2, 8)
    assert decoder.hidden[0].in_features == 10
    logits, colours = decoder(torch.randn(7, 2))
    assert logits.shape == (7,) and colours.shape == (7, 3) and (colours > 0).all() and (colours < 1).all()
