"""Rasteriser ops: worked cases, a slow ray caster, the torch twin, and finite differences."""

from importlib.util import find_spec

import pytest
import torch

from stages.cameras import orbit_views, rays, to_clip
from stages.kernels.cpu import raster as cpu_raster
from stages.kernels.raster import antialias, edge_topology, interpolate, rasterise, texture, vertex_normals
from stages.kernels.reference import antialias as reference_antialias
from stages.kernels.reference import raster as reference_raster
from tests.kernels.raster.raster_cases import EACH, EVERY, FAST, MESHES, ONE, WARP, flat, sphere


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
    hit = (ids > 0) & ~wrong
    torch.testing.assert_close(hits[hit], want[hit], atol=2e-4, rtol=0)


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
    leaves = (clip, rast, image, attributes, vertices)
    return smooth.detach(), topology, torch.autograd.grad((smooth * weight).sum(), leaves)


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
    for gradient in grads.values():
        for got, want in zip(gradient, grads["torch"], strict=True):
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


def test_the_walk_over_triangles_is_bounded_alike_in_both_backends():
    from stages.kernels.cpu import antialias as cpu_antialias

    assert cpu_antialias.STEPS_MAX == reference_antialias.STEPS_MAX


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Dynamo detected")
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
        actual = []
        for function in (picture, compiled):
            leaves = [t.clone().requires_grad_() for t in (vertices, texels)]
            out = function(*leaves, size)
            actual.append((out, *torch.autograd.grad(out.sum(), leaves)))
        for got, want in zip(*actual, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
