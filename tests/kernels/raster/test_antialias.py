"""Antialiasing: exact coverage, silhouettes against supersampling, and the pairs of edges that it walks."""

import numpy as np
import pytest
import torch

from stages.cameras import orbit_views, to_clip
from stages.kernels.raster import antialias, edge_topology, rasterise
from tests.kernels.raster.raster_cases import EVERY, ONE, flat, sphere


def coverage(points, triangles, height, width, backend, z=0.0):
    clip = flat(points, z)
    rast = rasterise(clip, triangles, height, width, backend=backend)
    mask = (rast[..., 3:] > 0).float()
    topology = edge_topology(triangles, clip.shape[1], backend=backend)
    return antialias(mask, rast, clip, triangles, topology, backend=backend)[0, ..., 0]


@EVERY
@pytest.mark.parametrize("edge", [2.1, 2.3, 2.5, 2.7, 2.95])
def test_an_upright_or_level_edge_covers_its_share_of_each_pixel(edge, backend):
    x = edge / 2 - 1  # in an image of 4 x 4 pixels
    quad = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
    got = coverage([[-9.0, -9.0], [x, -9.0], [x, 9.0], [-9.0, 9.0]], quad, 4, 4, backend)
    torch.testing.assert_close(got, torch.tensor([1.0, 1.0, edge - 2, 0.0]).expand(4, 4), atol=1e-5, rtol=0)
    got = coverage([[-9.0, -x], [9.0, -x], [9.0, 9.0], [-9.0, 9.0]], quad, 4, 4, backend)
    torch.testing.assert_close(got, torch.tensor([1.0, 1.0, edge - 2, 0.0])[:, None].expand(4, 4), atol=1e-5, rtol=0)


@EVERY
@pytest.mark.parametrize("angle", [10.0, 40.0, 50.0, 80.0, 130.0, 250.0])
def test_a_slanted_half_plane_has_its_exact_area(angle, backend):
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    corners = np.array([[-9, 0.03], [9, 0.03], [0, -9]]) @ np.array([[c, s], [-s, c]])
    got = coverage(corners, ONE, 16, 16, backend).sum() / 256
    fine = rasterise(flat(corners), ONE, 512, 512)[..., 3].mean()
    assert abs(got - fine) < 0.004  # what crosses the image border is not seen


@EVERY
def test_edges_inside_a_surface_are_left_alone(backend):
    wall = torch.tensor([[-9.0, -9.0], [0.1, -9.0], [9.0, -9.0], [9.0, 9.0], [0.3, 9.0], [-9.0, 9.0]])
    triangles = torch.tensor([[0, 1, 4], [0, 4, 5], [1, 2, 3], [1, 3, 4]], dtype=torch.int32)
    colour = torch.rand(1, 16, 16, 3)
    clip = flat(wall)
    rast = rasterise(clip, triangles, 16, 16, backend=backend)
    assert len(rast[..., 3].unique()) > 1
    topology = edge_topology(triangles, 6, backend=backend)
    assert torch.equal(antialias(colour, rast, clip, triangles, topology, backend=backend), colour)
    mixed = triangles.clone()
    mixed[1] = mixed[1].flip(0)  # one face wound the other way is no silhouette either
    topology = edge_topology(mixed, 6, backend=backend)
    assert torch.equal(antialias(colour, rast, clip, mixed, topology, backend=backend), colour)
    apart = edge_topology(triangles, 6) * 0 - 1  # were all edges borders, colours would mix
    assert not torch.equal(antialias(colour, rast, clip, triangles, apart, backend=backend), colour)


@EVERY
def test_a_hidden_silhouette_changes_nothing_and_one_before_a_surface_blends_with_it(backend):
    small = [[-0.43, -0.43], [0.43, -0.43], [0.43, 0.43], [-0.43, 0.43]]
    wide = [[-9.0, -9.0], [9.0, -9.0], [9.0, 9.0], [-9.0, 9.0]]
    triangles = torch.tensor([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]], dtype=torch.int32)
    topology = edge_topology(triangles, 8, backend=backend)
    for front in (True, False):
        clip = torch.cat([flat(small, -0.5 if front else 0.5), flat(wide, 0.0)], 1)
        rast = rasterise(clip, triangles, 16, 16, backend=backend)
        colour = (rast[..., 3:] <= 2).float()
        got = antialias(colour, rast, clip, triangles, topology, backend=backend)
        assert torch.equal(got, colour) != front
        if front:
            assert got.sum().item() == pytest.approx((0.43 * 16) ** 2, rel=0.02)


def test_twin_antialias_gradients_match_finite_differences():
    vertices, triangles = sphere(1)
    clip = to_clip(vertices.double(), orbit_views([20.0, 130.0]))
    rast = rasterise(clip, triangles, 12, 13)
    colour = torch.rand(2, 12, 13, 2, dtype=torch.float64, requires_grad=True)
    topology = edge_topology(triangles, len(vertices))
    blended = antialias(colour, rast, clip, triangles, topology)
    assert ((blended != colour).any(-1)).sum() > 40
    inputs = (colour, clip.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda c, p: antialias(c, rast, p, triangles, topology), inputs, eps=1e-7, atol=1e-5, fast_mode=True
    )


DIRECTIONS = {
    "growing": lambda v: v,
    "sliding": lambda v: torch.tensor([1.0, 0.4, 0.0]).expand_as(v),
    "bending": lambda v: torch.stack([v[:, 1] ** 2, v[:, 0], 0 * v[:, 2]], 1),
}


@pytest.mark.parametrize("motion", DIRECTIONS)
@pytest.mark.parametrize(("subdivisions", "size"), [(1, 64), (3, 64), (5, 96)])
def test_silhouette_gradient_is_that_of_the_supersampled_coverage(subdivisions, size, motion):
    """Derivative of a weighted coverage along a motion, against finite differences of 16 x 16 samples a pixel.

    With 20,480 triangles at 96 pixels a triangle is smaller than a pixel.
    """
    vertices, triangles = sphere(subdivisions, (1.0, 1.0, 1.0))
    view = orbit_views([20.0], 25.0)
    move = DIRECTIONS[motion](vertices)
    y, x = torch.meshgrid((torch.arange(size) + 0.5) / size, (torch.arange(size) + 0.5) / size, indexing="ij")
    weight = (torch.sin(5 * x + 1) * torch.cos(4 * y) + x * y)[None, ..., None]

    def supersampled(amount):
        rast = rasterise(to_clip(vertices + amount * move, view), triangles, size * 16, size * 16)
        mask = (rast[..., 3:] > 0).double()
        return (mask.view(1, size, 16, size, 16, 1).mean((2, 4)) * weight).sum()

    amount = torch.zeros((), requires_grad=True)
    clip = to_clip(vertices + amount * move, view)
    rast = rasterise(clip, triangles, size, size)
    topology = edge_topology(triangles, len(vertices))
    mask = antialias((rast[..., 3:] > 0).float(), rast, clip, triangles, topology)
    (mask * weight).sum().backward()
    truth = (supersampled(0.02) - supersampled(-0.02)) / 0.04
    assert amount.grad.item() == pytest.approx(truth.item(), rel=0.06)


def test_antialiasing_takes_nine_tenths_of_the_coverage_error_away():
    vertices, triangles = sphere(4)
    view = orbit_views([20.0], 25.0)
    clip = to_clip(vertices, view)
    rast = rasterise(clip, triangles, 64, 64)
    hard = (rast[..., 3:] > 0).float()
    soft = antialias(hard, rast, clip, triangles, edge_topology(triangles, len(vertices)))
    fine = (rasterise(clip, triangles, 1024, 1024)[..., 3:] > 0).float()
    want = fine.view(1, 64, 16, 64, 16, 1).mean((2, 4))
    assert (soft - want).abs().sum() < 0.15 * (hard - want).abs().sum()


@EVERY
def test_topology_pairs_the_half_edges_of_closed_meshes_and_marks_borders_and_fins(backend):
    vertices, triangles = sphere(2)
    topology = edge_topology(triangles, len(vertices), backend=backend).long()
    mate = topology.reshape(-1)
    assert (mate >= 0).all() and torch.equal(mate[mate], torch.arange(len(mate)))
    start, stop = triangles.roll(-1, 1).reshape(-1), triangles.roll(-2, 1).reshape(-1)
    assert torch.equal(start[mate], stop) and torch.equal(stop[mate], start)
    two = torch.tensor([[0, 1, 2], [2, 1, 3]], dtype=torch.int32)
    assert edge_topology(two, 4, backend=backend).tolist() == [[5, -1, -1], [-1, -1, 0]]
    fin = torch.tensor([[0, 1, 2], [2, 1, 3], [1, 2, 4]], dtype=torch.int32)
    assert (edge_topology(fin, 5, backend=backend) == -1).all()
    assert (edge_topology(torch.tensor([[0, 1, 0]], dtype=torch.int32), 2, backend=backend) == -1).all()
