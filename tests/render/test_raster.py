"""The mesh renderer: closed-form images of a sphere, gradients, and what an optimiser makes of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh

from stages.cameras import orbit_views, rays
from stages.kernels.raster import edge_topology
from stages.mesh.mesh import Mesh
from stages.render.raster import PLAIN, render_mesh, render_vertex_colours
from stages.render.shade import ALBEDO, LAMBERT, TEXTURELESS_ALBEDO, Shading, shade

BOTH = pytest.mark.parametrize("backend", ["numba", "torch"])
RADIUS = 0.8


def ball(subdivisions=4):
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=RADIUS)
    return torch.tensor(mesh.vertices, dtype=torch.float32), torch.tensor(mesh.faces, dtype=torch.int32)


def stripes(points):
    return (6 * points).sin() * 0.4 + 0.5


@BOTH
def test_a_sphere_has_its_normals_depths_colours_and_area(backend):
    vertices, triangles = ball()
    views = orbit_views([0.0, 120.0], 30.0)
    light = Shading(0.2, 0.8)
    images = render_mesh(vertices, triangles, stripes, views, 40, 48, shading=light, backend=backend)
    rays_o, rays_d = rays(views, 40, 48)
    along = -(rays_o * rays_d).sum(-1)
    miss = (rays_o.square().sum(-1) - along.square()).sqrt()  # distance of the ray from the centre
    depth = along - (RADIUS**2 - miss.square()).clamp_min(0).sqrt()
    points = rays_o + depth[..., None] * rays_d
    inner = miss < 0.9 * RADIUS
    assert inner.float().mean() > 0.2
    torch.testing.assert_close(images.depth[..., 0][inner], depth[inner], atol=4e-3, rtol=0)
    torch.testing.assert_close(images.normal[inner], (points / RADIUS)[inner], atol=1e-2, rtol=0)
    want = shade(stripes(points), points / RADIUS, points, views.light[:, None, None], light)
    torch.testing.assert_close(images.colour[inner], want[inner], atol=2e-2, rtol=0)
    assert (images.mask[inner] == 1).all() and (images.colour[miss > 1.1 * RADIUS] == 0).all()
    share = (miss < RADIUS).float().mean().item()
    assert images.mask.mean().item() == pytest.approx(share, rel=0.02)


def test_backdrop_shows_where_the_mesh_is_not_and_mixes_at_the_border():
    vertices, triangles = ball(3)
    views = orbit_views([0.0, 90.0])
    paper = torch.tensor([0.2, 0.5, 0.9])
    images = render_mesh(vertices, triangles, torch.zeros_like, views, 32, 32, backdrop=paper)
    torch.testing.assert_close(images.colour, (1 - images.mask) * paper, atol=1e-6, rtol=0)
    assert ((images.mask > 0.05) & (images.mask < 0.95)).sum() > 50
    picture = torch.rand(2, 32, 32, 3)
    images = render_mesh(vertices, triangles, torch.zeros_like, views, 32, 32, backdrop=picture)
    outside = (images.mask == 0)[..., 0]
    assert torch.equal(images.colour[outside], picture[outside])


def test_albedo_is_asked_once_at_the_covered_pixels():
    vertices, triangles = ball(3)
    calls = []

    def albedo(points):
        calls.append(points)
        return torch.ones_like(points)

    images = render_mesh(vertices, triangles, albedo, orbit_views([0.0, 50.0]), 24, 30)
    (points,) = calls
    assert len(points) == (images.rast[..., 3] > 0).sum()
    torch.testing.assert_close(points.norm(dim=1), torch.full((len(points),), RADIUS), atol=0.02, rtol=0)


def test_vertex_colours_are_the_colour_function_at_the_vertices():
    vertices, triangles = ball(5)
    views = orbit_views([20.0])
    by_vertex, by_point = (
        render_mesh(vertices, triangles, albedo, views, 48, 48, shading=LAMBERT).colour
        for albedo in (stripes(vertices), stripes)
    )
    torch.testing.assert_close(by_vertex, by_point, atol=0.02, rtol=0)


@BOTH
@pytest.mark.parametrize("triangles", [torch.zeros(0, 3), torch.tensor([[0, 1, 1]])])
def test_nothing_in_view_is_the_backdrop_and_still_has_a_graph(triangles, backend):
    vertices = torch.rand(3, 3, requires_grad=True)
    paper = torch.rand(1, 8, 8, 3)

    def never(points):
        raise AssertionError("no pixel is covered")

    images = render_mesh(
        vertices, triangles.int(), never, orbit_views([0.0]), 8, 8, backdrop=paper, shading=LAMBERT, backend=backend
    )
    assert torch.equal(images.colour, paper) and (images.mask == 0).all()
    (images.colour.sum() + images.mask.sum()).backward()
    assert (vertices.grad == 0).all()


def test_image_gradients_match_finite_differences():
    """Float64 through the twin, along random motions so small that no pixel changes its triangle."""
    vertices, triangles = ball(1)
    start = vertices.double()
    views = orbit_views([20.0, 140.0])
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 20, 20, 3, generator=g, dtype=torch.float64)

    def loss(v):
        images = render_mesh(v, triangles, stripes, views, 20, 20, shading=Shading(0.3, 0.7))
        return (images.colour * weight).sum() + (images.mask * weight[..., :1]).sum(), images.rast[..., 3]

    leaf = start.clone().requires_grad_()
    value, ids = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    for _ in range(3):
        move = torch.randn(start.shape, generator=g, dtype=torch.float64)
        (up, ids_up), (down, ids_down) = loss(start + 1e-7 * move), loss(start - 1e-7 * move)
        assert torch.equal(ids, ids_up) and torch.equal(ids, ids_down)
        assert (grad * move).sum().item() == pytest.approx((up - down).item() / 2e-7, rel=1e-4)


def test_numba_gives_the_twins_image_and_gradient():
    vertices, triangles = ball(3)
    views = orbit_views([20.0, 140.0])
    weight = torch.randn(2, 40, 40, 3, generator=torch.Generator().manual_seed(0))
    got = {}
    for backend in ("numba", "torch"):
        leaf = vertices.clone().requires_grad_()
        images = render_mesh(leaf, triangles, stripes, views, 40, 40, shading=LAMBERT, backend=backend)
        (grad,) = torch.autograd.grad((images.colour * weight).sum(), leaf)
        got[backend] = (images.colour, images.mask, images.normal, images.depth, grad / grad.abs().max())
    for fast, slow in zip(*got.values(), strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)


def test_a_known_topology_changes_nothing():
    vertices, triangles = ball(2)
    topology = edge_topology(triangles, len(vertices))
    args = (vertices, triangles, stripes, orbit_views([0.0]), 24, 24)
    assert torch.equal(render_mesh(*args).colour, render_mesh(*args, topology=topology).colour)


def test_gradients_reach_albedo_parameters_and_backdrop():
    vertices, triangles = ball(2)
    tint = torch.full((3,), 0.5, requires_grad=True)
    paper = torch.zeros(3, requires_grad=True)
    images = render_mesh(vertices, triangles, lambda p: tint.expand_as(p), orbit_views([0.0]), 24, 24, backdrop=paper)
    images.colour.sum().backward()
    torch.testing.assert_close(tint.grad, images.mask.sum().expand(3))
    torch.testing.assert_close(paper.grad, (1 - images.mask).sum().expand(3))


def test_silhouettes_alone_bring_a_ball_to_its_place_and_size():
    """Adam on centre and radius, from masks of two views; the triangles are about a pixel large."""
    vertices, triangles = ball(3)
    views = orbit_views([0.0, 90.0], 20.0)
    target = render_mesh(0.8 * vertices + torch.tensor([0.2, -0.1, 0.15]), triangles, white, views, 32, 32).mask
    centre, scale = torch.zeros(3, requires_grad=True), torch.ones((), requires_grad=True)
    adam = torch.optim.Adam([centre, scale], lr=0.04)
    for step in range(40):
        adam.param_groups[0]["lr"] = 0.04 * 0.94**step
        mask = render_mesh(scale * vertices + centre, triangles, white, views, 32, 32).mask
        adam.zero_grad()
        (mask - target).square().sum().backward()
        adam.step()
    assert scale.item() == pytest.approx(0.8, abs=0.01)
    torch.testing.assert_close(centre.detach(), torch.tensor([0.2, -0.1, 0.15]), atol=0.01, rtol=0)


def white(points):
    return torch.ones_like(points)


def cube(colours=None):
    mesh = trimesh.creation.box(extents=(1.0, 1.0, 1.0))
    return Mesh(mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32), colours)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("shading", [ALBEDO, LAMBERT, Shading(0.3, 0.7, True)], ids=lambda s: s.kind)
def test_fast_pictures_are_those_of_the_separate_operations(shading, smooth):
    mesh = cube(np.random.default_rng(0).random((8, 3)).astype(np.float32))
    views, paper = orbit_views([10.0, 100.0], 30.0), torch.rand(2, 24, 24, 3)
    fast, slow = (
        render_vertex_colours(mesh, views, 24, shading, paper, 3, smooth=smooth, backend=b) for b in ("numba", "torch")
    )
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)


def test_fast_pictures_agree_with_the_differentiable_renderer():
    vertices, triangles = ball(4)
    mesh = Mesh(vertices.numpy(), triangles.numpy(), stripes(vertices).numpy())
    views, paper = orbit_views([10.0, 100.0], 30.0), torch.tensor([1.0, 0.9, 0.8])
    fast = render_vertex_colours(mesh, views, 64, LAMBERT, paper, 4)
    slow = render_mesh(vertices, triangles, stripes(vertices), views, 64, 64, shading=LAMBERT, backdrop=paper).colour
    assert (fast - slow).abs().mean() < 2e-3 and (fast - slow).abs().max() < 0.2


def test_flat_faces_are_even_and_smooth_ones_are_not():
    view = orbit_views([30.0], 30.0)
    view = replace(view, light=1e4 * view.light)  # so far that it meets a face at one angle
    greys = {}
    for smooth in (True, False):
        picture = render_vertex_colours(cube(), view, 64, Shading(0.0, 1.0), smooth=smooth, supersample=1)
        greys[smooth] = (picture[..., 0] * 1000).round().unique()
    assert len(greys[False]) == 4  # three faces and the background
    assert len(greys[True]) > 100


def test_a_mesh_without_colours_is_light_grey_and_clay_ignores_colours():
    view = orbit_views([0.0], 0.0)
    assert render_vertex_colours(cube(), view, 16, ALBEDO)[0, 8, 8].tolist() == pytest.approx([PLAIN] * 3)
    red = cube(np.tile(np.float32([1, 0, 0]), (8, 1)))
    clay = render_vertex_colours(red, view, 16, Shading(1.0, 0.0, True))[0, 8, 8]
    assert clay.tolist() == pytest.approx([TEXTURELESS_ALBEDO] * 3)


def test_supersampling_is_the_box_filter_of_the_larger_picture():
    view, mesh = orbit_views([20.0], 20.0), cube()
    fine = render_vertex_colours(mesh, view, 64, LAMBERT, supersample=1)
    want = fine.view(1, 32, 2, 32, 2, 3).mean((2, 4))
    torch.testing.assert_close(render_vertex_colours(mesh, view, 32, LAMBERT, supersample=2), want)


def test_wrong_shapes_are_refused_by_name():
    vertices, triangles = ball(0)
    view = orbit_views([0.0])
    for name, change in {
        "vertices": {"vertices": vertices[:, :2]},
        "albedo": {"albedo": torch.rand(5, 3)},
        "backdrop": {"backdrop": torch.rand(2, 8, 8, 3)},
        "topology": {"topology": torch.zeros(3, 3, dtype=torch.int32)},
    }.items():
        arguments = {"vertices": vertices, "triangles": triangles, "albedo": stripes, "views": view} | change
        with pytest.raises(ValueError, match=f"{name}: wanted shape"):
            render_mesh(**arguments, height=8, width=8)


def test_sphere_area_grows_as_the_camera_comes_near():
    vertices, triangles = ball(3)
    for distance in (2.5, 4.0):
        view = orbit_views([0.0], 0.0, distance=distance, fov_deg=40.0)
        mask = render_mesh(vertices, triangles, white, view, 96, 96).mask
        tan = math.tan(math.asin(RADIUS / distance)) / math.tan(math.radians(20))
        assert mask.sum().item() == pytest.approx(math.pi * (48 * tan) ** 2, rel=0.02)
