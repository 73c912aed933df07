"""The networks of the gan stage: layers and lattice against their formulas, and gradients that arrive everywhere."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from stages.cameras import orbit_views
from stages.gan.draw import draw
from stages.gan.generator import BALL, QUIET, SLOPE, Generator, features_at
from stages.gan.layers import Linear, Mapping, ModulatedConv
from stages.gan.plane_sums import values_at, values_by_torch
from stages.gan.tets import BOX, TetGrid, edge_loss, rescued
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.render.raster import render_mesh
from stages.render.shade import ALBEDO, LAMBERT
from tests.stages.drafts.gan_cases import TINY


@pytest.fixture(scope="module")
def grid():
    return TetGrid(TINY.cells)


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return Generator(TINY)


def styles(generator, count=3, seed=1):
    z = torch.randn(2, count, TINY.latent, generator=torch.Generator().manual_seed(seed))
    return generator.map_geo(z[0]), generator.map_tex(z[1])


def shapes(generator, grid, count=3, seed=1):
    planes = generator.planes(*styles(generator, count, seed))
    sdf, offset = generator.lattice_values(planes, grid)
    return planes, sdf, offset


def test_mapping_reads_the_direction_of_its_latent_alone():
    torch.manual_seed(0)
    mapping, z = Mapping(8, 12, 2), torch.randn(3, 8)
    assert mapping(z).shape == (3, 12)
    torch.testing.assert_close(mapping(5 * z), mapping(z), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mapping(z)[0], mapping(z)[1])


def test_a_layers_rate_scales_its_steps_and_not_what_it_says():
    torch.manual_seed(0)
    layer, x = Linear(4, 2, rate=0.01), torch.ones(1, 4)
    before = layer(x).detach()
    with torch.no_grad():
        layer.weight += 1
    torch.testing.assert_close(layer(x) - before, torch.full((1, 2), 0.01 * 4 / math.sqrt(4)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_convolution_is_each_samples_own_convolution(demodulate):
    """StyleGAN2 eq. 1 and 3: weights of a sample are s_i w_ijk, over the root of the sum of their squares."""
    torch.manual_seed(0)
    layer, x, w = ModulatedConv(3, 5, 3, 4, demodulate), torch.randn(2, 3, 6, 6), torch.randn(2, 4)
    y = layer(x, w)
    for k in range(2):
        weight = layer.weight * layer.scale * layer.style(w)[k][None, :, None, None]
        if demodulate:
            weight = math.sqrt(2) * weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        torch.testing.assert_close(y[k], F.conv2d(x[k][None], weight, padding=1)[0], atol=1e-5, rtol=1e-4)


def test_points_read_the_sum_of_three_bilinear_samples():
    torch.manual_seed(0)
    planes, points = torch.randn(2, 3, 4, 6, 6), 0.8 * (2 * torch.rand(20, 3) - 1)
    owner = torch.arange(20) // 10
    axes = ((0, 1), (1, 2), (0, 2))
    for b in range(2):
        at = points[owner == b] / BOX
        truth = sum(
            F.grid_sample(planes[b, k][None], at[:, (i, j)][None, None], align_corners=True)[0, :, 0].T
            for k, (i, j) in enumerate(axes)
        )
        torch.testing.assert_close(features_at(planes, points, owner)[owner == b], truth, atol=1e-5, rtol=1e-4)


def test_kernel_of_lattice_values_equals_torch_with_its_gradients():
    torch.manual_seed(0)
    at = torch.randint(0, 9, (40, 3))
    tensors = torch.randn(2, 3, 9, 9, 6), torch.randn(6), torch.randn(2, 6, 4)
    push, results = torch.randn(2, 40, 4), []
    for function in (values_at, values_by_torch):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves, at)
        out.backward(push)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for kernel, truth in zip(*results, strict=True):
        torch.testing.assert_close(kernel, truth, atol=1e-4, rtol=1e-4)


def test_lattice_values_are_the_hidden_layer_asked_at_each_vertex(generator, grid):
    planes, sdf, _ = shapes(generator, grid, 2)
    owner = torch.zeros(len(grid), dtype=torch.long)
    features = features_at(planes.geometry[:1], grid.places, owner)
    hidden = F.leaky_relu(features @ generator.geo_hidden.matrices(planes.w_geo)[0] + generator.geo_hidden.bias, 0.2)
    values = hidden @ generator.geo_out.matrices(planes.w_geo)[0] + generator.geo_out.bias
    inner = ~grid.rim
    truth = QUIET * values[:, 0] + SLOPE * (grid.places.norm(dim=1) - BALL)
    torch.testing.assert_close(sdf[0][inner], truth[inner], atol=1e-4, rtol=1e-3)
    assert (sdf[:, grid.rim] > 0).all()


def test_surfaces_are_closed_manifold_and_each_its_own_shapes(generator, grid):
    _, sdf, offset = shapes(generator, grid)
    surfaces = grid.surfaces(sdf, offset)
    for b in range(3):
        alone = grid.surfaces(sdf[b : b + 1], offset[b : b + 1])
        report = measure(Mesh(alone.vertices.detach().numpy(), alone.faces.numpy()))
        assert report.solid and report.volume > 0.05
        torch.testing.assert_close(surfaces.vertices[surfaces.owner == b], alone.vertices)
    assert len(surfaces.faces) > 0 and surfaces.faces.max() < len(surfaces.vertices)


def test_a_tiled_picture_is_the_mesh_renderers(generator, grid):
    planes, sdf, offset = shapes(generator, grid)
    views = orbit_views([10.0, 100.0, 250.0], 20.0)
    with torch.no_grad():
        pictures = draw(generator, planes, grid.surfaces(sdf, offset), views, 48, LAMBERT)
        for b in range(3):
            alone = grid.surfaces(sdf[b : b + 1], offset[b : b + 1])

            def albedo(points, b=b):
                colours = generator.colours(planes, points, torch.full((len(points),), b))
                return torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)

            truth = render_mesh(alone.vertices, alone.faces, albedo, views[b], 48, 48, shading=LAMBERT)
            assert (pictures.colour[b] - truth.colour[0]).abs().max() < 1e-3
            assert (pictures.mask[b] - truth.mask[0]).abs().max() < 1e-3


def test_lost_shapes_are_given_a_surface_and_the_loss_that_brings_them_back(grid):
    """By hand: s_centre += -1 - max s, s_rim += 1 - min s, nothing else moves; the loss is the mean |s| of the lost."""
    sdf = torch.full((2, len(grid)), 0.5, requires_grad=True)
    with torch.no_grad():
        sdf[1] = grid.places.norm(dim=1) - 0.4
        sdf[0, 0] = 0.7
    made, loss = rescued(sdf, grid)
    assert torch.equal(made[1], sdf[1]) and loss.item() == pytest.approx(sdf[0].mean().item())
    inner = ~(grid.centre | grid.rim)
    assert torch.equal(made[0][inner], sdf[0][inner])
    assert torch.allclose(made[0][grid.centre], torch.tensor(0.5 - 1 - 0.7))
    assert torch.allclose(made[0][grid.rim], sdf[0][grid.rim] + 1 - 0.5)
    (gradient,) = torch.autograd.grad(loss + made.sum(), sdf)
    torch.testing.assert_close(gradient[0], torch.full_like(gradient[0], 1 / len(grid)))  # of the loss alone
    assert torch.equal(gradient[1], torch.ones_like(gradient[1]))
    assert rescued(sdf[1:], grid)[1] == 0


def test_edge_term_is_the_cross_entropy_of_each_end_with_the_others_sign():
    sdf = torch.tensor([[-2.0, 1.0, 3.0]])
    log = lambda x: math.log(1 / (1 + math.exp(-x)))  # noqa: E731 - log of a sigmoid
    by_hand = [-log(-2.0) - log(-1.0), -log(-2.0) - log(-3.0)]  # H(sigma(-2), 1) + H(sigma(1), 0), ...
    assert float(edge_loss(sdf, torch.tensor([[0, 1]]))) == pytest.approx(by_hand[0], rel=1e-5)
    assert float(edge_loss(sdf, torch.tensor([[0, 1], [0, 2]]))) == pytest.approx(sum(by_hand) / 2, rel=1e-5)
    assert edge_loss(sdf, torch.zeros(0, 2, dtype=torch.long)) == 0


def test_gradients_of_a_picture_reach_geometry_and_texture(generator, grid):
    planes, sdf, offset = shapes(generator, grid)
    views = orbit_views([0.0, 120.0, 240.0], 20.0)
    pictures = draw(generator, planes, grid.surfaces(sdf, offset), views, 32, ALBEDO)
    (pictures.mask.sum() + pictures.colour.square().sum()).backward()
    silent = [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent
    generator.zero_grad()
    planes, sdf, offset = shapes(generator, grid)
    draw(generator, planes, grid.surfaces(sdf, offset), views, 32, ALBEDO).mask.sum().backward()
    heard = {name.split(".")[0] for name, p in generator.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"map_geo", "geo_out", "start"} <= heard and not {"map_tex", "tex_out", "to_tex"} & heard


def test_silhouettes_gradient_at_the_signed_distance_is_the_coverages_slope(grid):
    """Finite differences of the coverage of a ball whose signed distance grows as a whole, in float32."""
    torch.manual_seed(0)
    generator, views = Generator(TINY), orbit_views([20.0], 10.0)
    planes, offset = generator.planes(*styles(generator, 1)), torch.zeros(1, len(grid), 3)
    ball = (grid.places.norm(dim=1) - 0.5)[None]

    def coverage(level):
        surfaces = grid.surfaces(grid.closed(ball + level), offset)
        return draw(generator, planes, surfaces, views, 64, ALBEDO).mask.sum()

    level = torch.zeros((), requires_grad=True)
    (slope,) = torch.autograd.grad(coverage(level), level)
    with torch.no_grad():
        truth = (coverage(torch.tensor(0.01)) - coverage(torch.tensor(-0.01))) / 0.02
    assert float(slope) == pytest.approx(float(truth), rel=0.05)


def test_styles_of_texture_move_no_surface_and_styles_of_geometry_do(generator, grid):
    w_geo, w_tex = styles(generator, 2)
    same = generator.planes(w_geo[:1].expand(2, -1), w_tex)
    sdf, _ = generator.lattice_values(same, grid)
    assert torch.equal(sdf[0], sdf[1])
    points, owner = torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])
    colours = generator.colours(same, points, owner)
    assert colours.min() >= 0 and colours.max() <= 1 and not torch.allclose(colours[0], colours[2])
    other, _ = generator.lattice_values(generator.planes(w_geo, w_tex), grid)
    assert not torch.allclose(other[0], other[1])
