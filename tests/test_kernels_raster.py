"""Rasteriser ops: worked cases, a slow ray caster, the torch twin, and finite differences."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
import trimesh

from stages.cameras import orbit_views, rays, to_clip
from stages.kernels.cpu import raster as cpu_raster
from stages.kernels.raster import antialias, edge_topology, interpolate, rasterise, texture, vertex_normals
from stages.kernels.reference import antialias as reference_antialias
from stages.kernels.reference import raster as reference_raster
from stages.mesh.mesh import Mesh

WARP = pytest.param("warp", marks=pytest.mark.skipif(find_spec("warp") is None, reason="warp-lang is not installed"))
FAST = pytest.mark.parametrize("backend", ["numba", WARP])
EVERY = pytest.mark.parametrize("backend", ["numba", "torch", WARP])
ONE = torch.tensor([[0, 1, 2]], dtype=torch.int32)


def flat(points, z=0.0, dtype=torch.float32):
    """Clip coordinates [1, V, 4] of points in normalised device coordinates, w = 1."""
    points = torch.as_tensor(points, dtype=dtype)
    return torch.cat([points, torch.full_like(points[:, :1], z), torch.ones_like(points[:, :1])], 1)[None]


def tensors(mesh):
    return torch.tensor(mesh.vertices, dtype=torch.float32), torch.tensor(mesh.faces, dtype=torch.int32)


def sphere(subdivisions, squash=(1.0, 0.7, 0.5)):
    vertices, triangles = tensors(trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.8))
    return vertices * torch.tensor(squash), triangles


def soup(vertices=60, triangles=80, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(vertices, 3, generator=g), torch.randint(0, vertices, (triangles, 3), generator=g).int()


MESHES = {
    "sphere": (*sphere(3), orbit_views([13.0, 200.0], 20.0)),
    "fine sphere": (*sphere(5), orbit_views([40.0], -20.0)),
    "torus": (*tensors(trimesh.creation.torus(0.5, 0.2, 24, 12)), orbit_views([10.0, 100.0], 50.0)),
    "box": (*tensors(trimesh.creation.box()), orbit_views([10.0, 45.0], 30.0)),
    "soup around the camera": (*soup(), orbit_views([0.0, 90.0], 10.0, distance=1.0)),
}
EACH = pytest.mark.parametrize("name", MESHES)


@pytest.mark.slow
@EVERY
def test_one_triangle_covers_the_pixel_centres_inside_it_row_0_at_the_top(backend):
    clip = flat([[-1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]], z=0.25)  # the upper left half
    rast = rasterise(clip, ONE, 4, 4, backend=backend)
    want = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])  # centres on the edge count
    assert torch.equal(rast[0, ..., 3].int(), want.int())
    torch.testing.assert_close(rast[0, 0, 0], torch.tensor([0.75, 0.125, 0.25, 1.0]))
    torch.testing.assert_close(rast[0, 2, 0, :2], torch.tensor([0.25, 0.625]))
    assert rast[0, 3, 3].tolist() == [0, 0, 0, 0]


@EVERY
def test_the_nearer_triangle_wins_and_of_equals_the_first(backend):
    corners = [[-1.0, 1.0], [-1.0, -3.0], [3.0, 1.0]]
    clip = torch.cat([flat(corners, z) for z in (0.5, -0.5, -0.5)], 1)
    triangles = torch.arange(9, dtype=torch.int32).view(3, 3)
    assert (rasterise(clip, triangles, 5, 6, backend=backend)[..., 3] == 2).all()


@EVERY
def test_back_faces_are_drawn(backend):
    clip = flat([[-1.0, 1.0], [3.0, 1.0], [-1.0, -3.0]])
    for triangle in (ONE, ONE.flip(1)):
        assert (rasterise(clip, triangle, 3, 3, backend=backend)[..., 3] == 1).all()


def cast(vertices, triangles, views, height, width):
    """Moeller-Trumbore in float64 against every triangle: nearest id, distance, and how far inside the hit lies."""
    rays_o, rays_d = (r.double()[..., None, :] for r in rays(views, height, width))
    a, b, c = vertices.double()[triangles.long()].unbind(1)
    p = torch.linalg.cross(rays_d, (c - a).expand(*rays_d.shape[:3], -1, 3))
    det = (p * (b - a)).sum(-1)
    s = rays_o - a
    u = (p * s).sum(-1) / det
    q = torch.linalg.cross(s, (b - a).expand_as(s))
    v = (q * rays_d).sum(-1) / det
    t = (q * (c - a)).sum(-1) / det
    margin = torch.minimum(torch.minimum(u, v), 1 - u - v)
    t = torch.where((margin >= 0) & (t > 0), t, torch.inf)
    near, f = t.min(-1)
    return torch.where(near < torch.inf, f + 1, 0), near, margin


@EVERY
@EACH
def test_visible_triangles_and_positions_are_those_of_a_ray_caster(name, backend):
    vertices, triangles, views = MESHES[name]
    if "sphere" in name:
        vertices, triangles = sphere(2)
    ahead = -(vertices @ views.c2w[:, :3, 2].T - (views.position * views.c2w[:, :3, 2]).sum(1))  # [V, B] eye depth
    triangles = triangles[(ahead.amin(1) > 0.11)[triangles.long()].all(1)]  # those in front of the near plane
    rast = rasterise(to_clip(vertices, views, 24 / 20), triangles, 20, 24, backend=backend)
    ids, near, margin = cast(vertices, triangles, views, 20, 24)
    wrong = ids != rast[..., 3].long()
    close = (margin.abs() < 1e-4).any(-1)  # an edge passes through the pixel centre
    assert wrong.float().mean() < 0.01 and not (wrong & ~close).any()
    assert (ids > 0).float().mean() > 0.1
    hits = interpolate(vertices, rast, triangles, backend=backend)
    rays_o, rays_d = rays(views, 20, 24)
    want = rays_o + near.float()[..., None] * rays_d
    seen = (ids > 0) & ~wrong
    torch.testing.assert_close(hits[seen], want[seen], atol=2e-4, rtol=0)


@EACH
@FAST
def test_compiled_kernels_give_the_twins_pixels(name, backend):
    vertices, triangles, views = MESHES[name]
    clip = to_clip(vertices, views, 57 / 50)
    fast, slow = (rasterise(clip, triangles, 50, 57, backend=b) for b in (backend, "torch"))
    assert torch.equal(fast[..., 3], slow[..., 3])
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=0)


@EVERY
def test_no_pixel_falls_between_neighbours(backend):
    """Vertices on pixel centres, on their borders and anywhere, split under separate indices or shared."""
    g = torch.Generator().manual_seed(3)
    n = 12
    x, y = torch.meshgrid(torch.arange(n + 1), torch.arange(n + 1), indexing="ij")
    grid = torch.stack([x, y], -1).double() / n * 2 - 1
    inner = ((x > 0) & (x < n) & (y > 0) & (y < n))[..., None]
    moves = torch.rand(n + 1, n + 1, 2, generator=g, dtype=torch.float64) * 0.12 - 0.06
    snapped = ((grid + moves) * 16 * 2).round() / 32  # multiples of half a pixel at 32 x 32
    i = (x[:-1, :-1] * (n + 1) + y[:-1, :-1]).reshape(-1)
    triangles = torch.cat([torch.stack([i, i + 1, i + n + 2], 1), torch.stack([i, i + n + 2, i + n + 1], 1)]).int()
    for moved in (grid, torch.where(inner, grid + moves, grid), torch.where(inner, snapped, grid)):
        points = moved.reshape(-1, 2).float() * 1.0001
        assert (rasterise(flat(points), triangles, 32, 32, backend=backend)[..., 3] > 0).all()
        split = points[triangles.long().reshape(-1)]
        apart = torch.arange(len(split), dtype=torch.int32).view(-1, 3)
        assert (rasterise(flat(split), apart, 32, 32, backend=backend)[..., 3] > 0).all()


@EVERY
def test_a_triangle_through_the_near_plane_is_cut_there_and_one_through_the_eye_is_left_out(backend):
    view = orbit_views([0.0], 0.0, distance=3.0, fov_deg=90.0)
    floor = torch.tensor([[-50.0, -0.5, -40.0], [50.0, -0.5, -40.0], [0.0, -0.5, 2.99]])  # to 0.01 before the eye
    rast = rasterise(to_clip(floor, view), ONE, 64, 64, backend=backend)
    column = rast[0, :, 31, 3]  # 0.5 below the axis: seen from 45 degrees down (not clipped) to the horizon
    assert (column[34:] == 1).all() and (column[:32] == 0).all() and rast[..., 2].min() >= -1
    shallow = torch.tensor([[-50.0, -0.02, -40.0], [50.0, -0.02, -40.0], [0.0, -0.02, 2.99]])
    column = rasterise(to_clip(shallow, view), ONE, 64, 64, backend=backend)[0, :, 31]
    rows = 1 - 2 * (torch.arange(64) + 0.5) / 64
    distance = 0.02 / -rows  # where the row's ray meets the floor: drawn from the near plane on
    assert torch.equal(column[:, 3] == 1, (rows < -0.02 / 43) & (distance > 0.1))
    floor[2, 2] = 3.01
    assert (rasterise(to_clip(floor, view), ONE, 64, 64, backend=backend) == 0).all()


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_or_too_far_is_left_out_and_the_rest_is_drawn(bad, backend):
    corners = flat([[-1.0, 1.0], [-1.0, -3.0], [3.0, 1.0]])
    for channel in range(2):
        broken = flat([[-1.0, 1.0], [-1.0, -3.0], [3.0, 1.0]], z=-0.5)
        broken[0, 1, channel] = bad
        triangles = torch.arange(6, dtype=torch.int32).view(2, 3)
        rast = rasterise(torch.cat([broken, corners], 1), triangles, 5, 5, backend=backend)
        assert (rast[..., 3] == 2).all() and torch.isfinite(rast).all()


@EVERY
def test_huge_triangles_keep_their_edges(backend):
    """A half plane whose edge runs through the image, spanned by corners a million pixels away."""
    clip = flat([[0.1 - 1e5, -1e5], [0.1 + 1e5, 1e5], [-3e5, 1e5]])  # the edge y = x - 0.1
    rast = rasterise(clip, ONE, 32, 32, backend=backend)
    y, x = torch.meshgrid(1 - (torch.arange(32) + 0.5) / 16, (torch.arange(32) + 0.5) / 16 - 1, indexing="ij")
    assert torch.equal(rast[0, ..., 3] == 1, y > x - 0.1)


@EVERY
def test_degenerate_triangles_draw_nothing(backend):
    clip = flat([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    triangles = torch.tensor([[0, 1, 2], [2, 3, 2], [0, 0, 0], [0, 1, 1]], dtype=torch.int32)
    assert (rasterise(clip, triangles, 8, 8, backend=backend) == 0).all()


@pytest.mark.slow
@EVERY
def test_empty_input_gives_empty_images(backend):
    none = torch.zeros(0, 3, dtype=torch.int32)
    for clip in (torch.zeros(2, 0, 4), flat([[0.0, 0.0]]).expand(2, 1, 4)):
        rast = rasterise(clip, none, 3, 5, backend=backend)
        assert rast.shape == (2, 3, 5, 4) and (rast == 0).all()
        topology = edge_topology(none, clip.shape[1], backend=backend)
        colour = torch.rand(2, 3, 5, 3)
        assert torch.equal(antialias(colour, rast, clip, none, topology, backend=backend), colour)
        assert (interpolate(clip[0, :, :2], rast, none, backend=backend) == 0).all()
    no_views = rasterise(torch.zeros(0, 3, 4), ONE, 3, 5, backend=backend)
    assert no_views.shape == (0, 3, 5, 4)
    assert interpolate(torch.zeros(3, 2), no_views, ONE, backend=backend).shape == (0, 3, 5, 2)
    topology, colour = edge_topology(ONE, 3, backend=backend), torch.zeros(0, 3, 5, 3)
    assert antialias(colour, no_views, torch.zeros(0, 3, 4), ONE, topology, backend=backend).shape == (0, 3, 5, 3)


@EVERY
def test_tensors_need_not_be_contiguous(backend):
    vertices, triangles, views = MESHES["sphere"]
    clip = to_clip(vertices, views)
    strided = torch.stack([clip, clip], -1)[..., 0]
    transposed = triangles.T.contiguous().T
    assert not strided.is_contiguous() and not transposed.is_contiguous()
    rast = rasterise(clip, triangles, 16, 16, backend=backend)
    assert torch.equal(rasterise(strided, transposed, 16, 16, backend=backend), rast)
    attributes = torch.rand(2, len(vertices)).T
    want = interpolate(attributes.contiguous(), rast, triangles, backend=backend)
    columns_first = rast.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    got = interpolate(attributes, columns_first, transposed, backend=backend)
    assert torch.equal(got, want)
    topology = edge_topology(transposed, len(vertices), backend=backend)
    smooth = antialias(want, rast, clip, triangles, topology, backend=backend)
    flipped = want.flip(3)[..., [1, 0]].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(antialias(flipped, rast, strided, transposed, topology, backend=backend), smooth)


def test_wrong_arguments_are_refused_by_name():
    clip, rast = flat([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.zeros(1, 4, 4, 4)
    with pytest.raises(ValueError, match="backend: unknown name 'cuda', have auto, torch, numba, warp, nvdiffrast"):
        rasterise(clip, ONE, 4, 4, backend="cuda")
    with pytest.raises(ValueError, match="'numba' takes float32 tensors on the CPU, got float64"):
        rasterise(clip.double(), ONE, 4, 4, backend="numba")
    with pytest.raises(ValueError, match="clip: wanted dtype float32.*got float16"):
        rasterise(clip.half(), ONE, 4, 4)
    with pytest.raises(ValueError, match="triangles: wanted dtype int32, got int64"):
        rasterise(clip, ONE.long(), 4, 4)
    with pytest.raises(ValueError, match=r"triangles: wanted indices in \[0, 3\), got 0 to 3"):
        rasterise(clip, torch.tensor([[0, 1, 3]], dtype=torch.int32), 4, 4)
    with pytest.raises(ValueError, match=r"triangles: wanted shape \[\*, 3\], got \[3\]"):
        rasterise(clip, ONE[0], 4, 4)
    with pytest.raises(ValueError, match=r"clip: wanted shape \[\*, \*, 4\], got \[3, 4\]"):
        rasterise(clip[0], ONE, 4, 4)
    with pytest.raises(ValueError, match="height, width: wanted at least 1 pixel, got 0 x 4"):
        rasterise(clip, ONE, 0, 4)
    with pytest.raises(ValueError, match="attributes: wanted dtype float32.*got int32"):
        interpolate(torch.zeros(3, 2, dtype=torch.int32), rast, ONE)
    with pytest.raises(ValueError, match=r"attributes: wanted shape \[1, \*, \*\], got \[2, 3, 1\]"):
        interpolate(torch.zeros(2, 3, 1), rast, ONE)
    with pytest.raises(ValueError, match="topology: wanted shape"):
        antialias(torch.zeros(1, 4, 4, 3), rast, clip, ONE, torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"topology: wanted indices in \[-1, 3\), got 3 to 3"):
        antialias(torch.zeros(1, 4, 4, 3), rast, clip, ONE, torch.full((1, 3), 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="image: wanted at least one texel"):
        texture(torch.zeros(0, 4, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"uv: wanted shape \[5, 2\], got \[5, 3\]"):
        texture(torch.zeros(4, 4, 3), torch.zeros(5, 3))


def test_twin_gradients_match_finite_differences():
    vertices, triangles = sphere(1)
    clip = to_clip(vertices.double(), orbit_views([20.0, 130.0]))
    attributes = torch.rand(len(vertices), 3, dtype=torch.float64)
    rast = rasterise(clip, triangles, 9, 8)

    def image(c, a):
        u, v = reference_raster.barycentrics(c, triangles, rast[..., 3].long() - 1)  # coverage held still
        return interpolate(a, torch.stack([u, v, rast[..., 2], rast[..., 3]], -1), triangles)

    inputs = (clip.requires_grad_(), attributes.requires_grad_())
    assert torch.autograd.gradcheck(image, inputs, eps=1e-6, atol=1e-5, fast_mode=True)
    assert torch.equal(image(*inputs), interpolate(attributes, rasterise(clip, triangles, 9, 8), triangles))


def gradients(name, backend, size=(50, 57)):
    vertices, triangles, views = MESHES[name]
    g = torch.Generator().manual_seed(0)
    attributes = torch.rand(len(vertices), 3, generator=g).requires_grad_()
    weight = torch.randn(len(views), *size, 6, generator=g)
    vertices = vertices.clone().requires_grad_()
    clip = to_clip(vertices, views, size[1] / size[0])
    rast = rasterise(clip, triangles, *size, backend=backend)
    normals = vertex_normals(vertices, triangles, backend=backend)
    image = interpolate(torch.cat([attributes, normals], 1), rast, triangles, backend=backend)
    topology = edge_topology(triangles, len(vertices), backend=backend)
    smooth = antialias(image, rast, clip, triangles, topology, backend=backend)
    kept = (clip, rast, image, attributes, vertices)
    return smooth.detach(), topology, torch.autograd.grad((smooth * weight).sum(), kept)


@EACH
@FAST
def test_compiled_kernels_give_the_twins_gradients(name, backend):
    """The whole chain; numba's antialiasing walks edges and the twin's pixel pairs, so this compares two ways."""
    fast, slow = gradients(name, backend), gradients(name, "torch")
    assert torch.equal(fast[1], slow[1])
    torch.testing.assert_close(fast[0], slow[0], atol=1e-6, rtol=0)
    for got, want in zip(fast[2], slow[2], strict=True):
        assert (got - want).abs().max() <= 5e-6 * want.abs().max()
        assert want.abs().max() > 0


def test_attributes_per_view_get_gradients_per_view():
    vertices, triangles, views = MESHES["sphere"]
    rast = rasterise(to_clip(vertices, views), triangles, 20, 20).requires_grad_()
    attributes = torch.rand(2, len(vertices), 3)
    weight = torch.randn(2, 20, 20, 3)
    grads = {}
    for backend in ("numba", "torch", *(["warp"] if find_spec("warp") else [])):
        leaf = attributes.clone().requires_grad_()
        out = interpolate(leaf, rast, triangles, backend=backend)
        torch.testing.assert_close(out[1], interpolate(attributes[1], rast[1:], triangles, backend=backend)[0])
        grads[backend] = torch.autograd.grad((out * weight).sum(), (leaf, rast))
    for found in grads.values():
        for got, want in zip(found, grads["torch"], strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_bytes_do_not_depend_on_runs_or_threads():
    vertices, triangles, views = MESHES["sphere"]
    assert cpu_raster.private_copies(1, 300 * 300) > 1  # large enough that the scatter is split
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs += [gradients("sphere", "numba", (300, 300)) for _ in range(2)]
    for other in runs[1:]:
        assert torch.equal(runs[0][0], other[0])
        assert all(torch.equal(a, b) for a, b in zip(runs[0][2], other[2], strict=True))


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


@EVERY
def test_texture_blends_texels_v_up_and_clamps(backend):
    image = torch.tensor([[[0.0], [1.0]], [[2.0], [3.0]]])  # row 0 at the top
    uv = torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.5, 0.5], [0.5, 0.75], [-5.0, 9.0], [7.0, -1.0]])
    got = texture(image, uv, backend=backend)
    assert got[:, 0].tolist() == [0, 3, 1.5, 0.5, 0, 3]
    assert texture(image, torch.full((1, 2), float("nan")), backend=backend).isfinite().all()
    assert texture(image[:1, :1], uv, backend=backend)[:, 0].tolist() == [0] * 6


@EVERY
def test_texture_is_that_of_grid_sample(backend):
    g = torch.Generator().manual_seed(0)
    image, uv = torch.rand(7, 5, 3, generator=g), torch.rand(2, 30, 4, 2, generator=g) * 1.4 - 0.2
    grid = torch.stack([uv[..., 0] * 2 - 1, 1 - 2 * uv[..., 1]], -1)
    source = image.permute(2, 0, 1)[None].expand(2, -1, -1, -1)
    want = torch.nn.functional.grid_sample(source, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(texture(image, uv, backend=backend), want.permute(0, 2, 3, 1), atol=1e-5, rtol=0)


def test_texture_gradients_match_finite_differences_and_the_twin():
    g = torch.Generator().manual_seed(0)
    image = torch.rand(6, 5, 2, generator=g, dtype=torch.float64, requires_grad=True)
    uv = (torch.rand(40, 2, generator=g, dtype=torch.float64) * 1.2 - 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, p: texture(i, p), (image, uv), atol=1e-6, fast_mode=True)
    weight = torch.randn(40, 2, generator=g)
    grads = []
    for backend in ("numba", "torch"):
        leaves = [t.detach().float().requires_grad_() for t in (image, uv)]
        grads.append(torch.autograd.grad((texture(*leaves, backend=backend) * weight).sum(), leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@EVERY
def test_vertex_normals_are_area_weighted_and_guarded(backend):
    vertices, triangles = sphere(2)
    got = vertex_normals(vertices, triangles, backend=backend)
    want = Mesh(vertices.numpy(), triangles.numpy()).vertex_normals()
    torch.testing.assert_close(got, torch.from_numpy(want), atol=1e-6, rtol=0)
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 0, 1], [5, 5, 5]], requires_grad=True)
    odd = torch.tensor([[0, 1, 2], [0, 3, 1], [0, 1, 3]], dtype=torch.int32)  # a sliver, and two that cancel
    normals = vertex_normals(points, odd, backend=backend)
    assert torch.equal(normals, torch.tensor([0.0, 1.0, 0.0]).expand(5, 3))
    normals.sum().backward()
    assert (points.grad == 0).all()


def test_vertex_normal_gradients_match_finite_differences():
    vertices, triangles = sphere(0)
    assert torch.autograd.gradcheck(lambda v: vertex_normals(v, triangles), (vertices.double().requires_grad_(),))


def test_the_walk_over_triangles_is_bounded_alike_in_both_backends():
    from stages.kernels.cpu import antialias as cpu_antialias

    assert cpu_antialias.STEPS_MAX == reference_antialias.STEPS_MAX


@pytest.mark.slow
@pytest.mark.parametrize("backend", [WARP])
def test_the_ops_work_inside_torch_compile(backend):
    """As breaks in its graph, at two sizes; for numba in test_kernels_compile.py."""
    vertices, triangles, views = MESHES["box"]
    texels = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0))

    def picture(points, image, size):
        clip = to_clip(points, views) * 1.0
        rast = rasterise(clip, triangles, size, size, backend=backend)
        planes = interpolate(torch.cat([points, vertex_normals(points, triangles, backend=backend)], 1) + 0.5, rast,
                             triangles, backend=backend)  # fmt: skip
        colour = texture(image * 2, planes[..., :2], backend=backend) + planes[..., 3:]
        topology = edge_topology(triangles, len(points), backend=backend)
        return antialias(colour, rast, clip, triangles, topology, backend=backend).sin()

    compiled = torch.compile(picture, backend="aot_eager")
    for size in (12, 13):
        found = []
        for function in (picture, compiled):
            leaves = [t.clone().requires_grad_() for t in (vertices, texels)]
            out = function(*leaves, size)
            found.append((out, *torch.autograd.grad(out.sum(), leaves)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
