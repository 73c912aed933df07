"""Adaptors: their mapping against stand-ins in the packages' conventions, and the packages themselves where they are.

The stand-ins (fake_kernels.py) are ours, so the first part shows that conventions are translated, not that a package
has them; that is for the tests marked `cuda`.
"""

import sys

import pytest
import torch

from stages.cameras import orbit_views, to_clip
from stages.kernels.adaptors import nvdiffrast as adaptor_nvdiffrast
from stages.kernels.adaptors import tinycudann as adaptor_tinycudann
from stages.kernels.backend import Selection, probe, selected
from stages.kernels.density import hash_density
from stages.kernels.grid import HashGridSpec
from stages.kernels.hashgrid import hash_encode, hash_gradient
from stages.kernels.marching import marching_tetrahedra, mesh_edges
from stages.kernels.mlp import mlp, mlp_with_slope
from stages.kernels.raster import antialias, edge_topology, interpolate, rasterise, texture
from stages.mesh.tets.dmtet import from_function
from stages.mesh.tets.tetrahedra import Lattice
from tests import fake_kernels

SMALL = HashGridSpec(levels=5, log2_table=8, base=3, finest=40)  # two dense levels of 64 and 216 rows, three hashed
FAMILY = {"tinycudann": ("hash", "mlp"), "nvdiffrast": ("raster",), "kaolin": ("marching",)}


def forget():
    for cached in (adaptor_tinycudann._all_levels, adaptor_tinycudann._one_level, adaptor_tinycudann._network):
        cached.cache_clear()
    adaptor_nvdiffrast.context.cache_clear()


@pytest.fixture
def fake(monkeypatch):
    """fake(name): put a stand-in in a package's place and let its families choose it on the CPU."""

    def install(name):
        forget()
        for module, stand_in in getattr(fake_kernels, name)().items():
            monkeypatch.setitem(sys.modules, module, stand_in)
        return selected(Selection("cpu", dict.fromkeys(FAMILY[name], name)))

    yield install
    forget()


def grid_problem(spec, n=400, seed=0, device="cpu"):
    """Points away from cell walls (kinks), where the two ways of rounding a position may fall on two sides of one."""
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(4 * n, 3, generator=g)
    for resolution in spec.resolutions:
        share = points * resolution % 1
        points = points[((share > 2e-3) & (share < 1 - 2e-3)).all(1)]
    points = points[:n]
    table = torch.randn(spec.rows, spec.features, generator=g)
    g_out, up = torch.randn(len(points), spec.width, generator=g), torch.randn(len(points), 3, generator=g)
    return [v.to(device) for v in (points, table, g_out, up)]


def grid_results(points, table, g_out, up, spec, backend):
    """Encoding, its gradient by position, and every derivative of both."""
    p, t, h = (v.clone().requires_grad_() for v in (points, table, g_out))
    encoded = hash_encode(p, t, spec, backend=backend)
    first = torch.autograd.grad((encoded * g_out).sum(), (p, t))
    slope = hash_gradient(p, t, spec, h, backend=backend)
    second = torch.autograd.grad((slope * up).sum(), (t, h))
    return [encoded, slope, *first, *second]


def assert_close(found, wanted, relative):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = float(b.detach().abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=relative * max(scale, 1e-30))


def test_tinycudann_grid_is_ours_in_values_and_derivatives(fake):
    for spec in (SMALL, HashGridSpec(levels=4, features=4, log2_table=10, base=5, finest=300)):
        arguments = grid_problem(spec)
        assert len(arguments[0]) > 50
        with fake("tinycudann"):
            found = grid_results(*arguments, spec, "auto")
        assert_close(found, grid_results(*arguments, spec, "torch"), 2e-4)


def test_tinycudann_grid_ends_at_the_walls_as_ours_does(fake):
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 1, 0.3], [1, 0.7, 0]])
    points = torch.cat([corners, torch.tensor([[-0.4, 0.31, 1.6], [0.31, 3e38, 0.62]])])
    table = torch.randn(SMALL.rows, 2, generator=torch.Generator().manual_seed(1))
    up = torch.ones(len(points), SMALL.width)
    with fake("tinycudann"):
        found = grid_results(points, table, up, points[:, :3], SMALL, "auto")
    wanted = grid_results(points, table, up, points[:, :3], SMALL, "torch")
    assert float(found[2][1].abs().min()) > 0  # a point on the far wall has a slope
    assert float(found[2][4, 0]) == 0 == float(found[2][5, 1])  # one outside has none
    assert_close(found[:3], wanted[:3], 2e-4)


def test_tinycudann_grid_makes_nan_of_a_point_that_is_not_finite(fake):
    points, table, g_out, up = grid_problem(SMALL, 20)
    points[3, 1], points[5, 0], points[7] = float("nan"), float("inf"), float("-inf")
    with fake("tinycudann"):
        found = grid_results(points, table, g_out, up, SMALL, "auto")
    for values in found[:2]:
        assert values.isnan().all(1).nonzero()[:, 0].tolist() == [3, 5, 7]
        assert values.isfinite().all(1).sum() == 17


@pytest.mark.parametrize("cells", [1, 2, 3, 5, 16, 40, 255, 256, 257, 1000, 4095, 65535, 65536])
def test_a_shifted_position_never_leaves_its_cells(cells):
    tiny = torch.finfo(torch.float32).tiny
    x = torch.cat([torch.tensor([0.0, tiny, 1e-7, 1 - 2**-24, 1.0]), torch.rand(200)])
    p = (adaptor_tinycudann._local(x[:, None].expand(-1, 3), cells).double() * cells + 0.5).float()  # its fma
    assert float(p.min()) >= 0 and float(p.max()) < cells
    assert float((p[:, 0].double() - x.double() * cells).abs().max()) <= 2e-7 * cells


def test_a_table_goes_to_tinycudann_row_by_row_with_padding_after_dense_levels():
    spec = HashGridSpec(levels=3, log2_table=8, base=2, finest=8)  # 27, 125 and 256 rows
    table = torch.arange(spec.rows * 2, dtype=torch.float32).reshape(-1, 2)
    rows = adaptor_tinycudann._packed(table, spec).reshape(-1, 2)
    assert len(rows) == 32 + 128 + 256
    assert torch.equal(rows[:27], table[:27]) and not rows[27:32].any()
    assert torch.equal(rows[32:157], table[27:152]) and not rows[157:160].any()
    assert torch.equal(rows[160:], table[152:])


def test_tinycudann_refuses_other_feature_counts_and_another_layout(fake, monkeypatch):
    spec = HashGridSpec(levels=2, features=3, log2_table=8, base=3, finest=8)
    with fake("tinycudann"):
        with pytest.raises(ValueError, match="1, 2, 4 or 8 features"):
            hash_encode(torch.rand(2, 3), torch.zeros(spec.rows, 3), spec)
        monkeypatch.setattr(adaptor_tinycudann, "ROWS", 4)
        with pytest.raises(ValueError, match="another version's layout"):
            odd = HashGridSpec(levels=2, log2_table=8, base=2, finest=8)
            hash_encode(torch.rand(2, 3), torch.zeros(odd.rows, 2), odd)


def test_tinycudann_is_not_asked_about_no_points(fake):
    table, g = torch.randn(SMALL.rows, 2, requires_grad=True), torch.zeros(0, SMALL.width, requires_grad=True)
    w = [torch.randn(*shape, requires_grad=True) for shape in ((16, 7), (16,), (3, 16), (3,))]
    with fake("tinycudann"):
        encoded, slope = hash_encode(torch.zeros(0, 3), table, SMALL), hash_gradient(torch.zeros(0, 3), table, SMALL, g)
        out = mlp(torch.zeros(0, 7), *w)
        (encoded.sum() + slope.sum() + out.sum()).backward()
    assert encoded.shape == (0, SMALL.width) and slope.shape == (0, 3) and out.shape == (0, 3)
    assert not table.grad.any() and g.grad.shape == g.shape and not any(v.grad.any() for v in w)


def test_without_gradients_tinycudann_gives_the_same_and_keeps_no_graph(fake):
    points, table, g, _ = grid_problem(SMALL, 50)
    table.requires_grad_()
    with fake("tinycudann"), torch.no_grad():
        slope = hash_gradient(points, table, SMALL, g)
    assert not slope.requires_grad
    assert_close([slope], [hash_gradient(points, table.detach(), SMALL, g, backend="torch")], 2e-4)


def perceptron(n, inputs, hidden, outputs, device="cpu"):
    g = torch.Generator().manual_seed(5)
    shapes = ((n, inputs), (hidden, inputs), (hidden,), (outputs, hidden), (outputs,))
    return [torch.randn(*s, generator=g).to(device).requires_grad_() for s in shapes]


def perceptron_results(arguments, backend, loss_scale=1.0):
    out = mlp(*arguments, backend=backend)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.device)
    gradients = torch.autograd.grad((out * up).mean() * loss_scale, arguments)
    return [out, *(g / loss_scale for g in gradients)]


def assert_half(found, wanted):
    """Equal but for the rounding of half precision, which also switches a few hidden units that are almost zero."""
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert float((a - b).detach().norm()) < 5e-2 * float(b.detach().norm())


@pytest.mark.parametrize("sizes", [(7, 10, 3), (32, 32, 1), (16, 64, 4), (5, 130, 17)])
def test_tinycudann_perceptron_is_ours_to_half_precision(sizes, fake):
    arguments = perceptron(300, *sizes)
    with fake("tinycudann"):
        found = perceptron_results(arguments, "auto")
    assert_half(found, perceptron_results(arguments, "torch"))


@pytest.mark.parametrize("loss_scale", [1e-9, 1e-3, 1e6])
def test_gradients_beyond_the_range_of_half_precision_come_through(loss_scale, fake):
    arguments = perceptron(3000, 32, 32, 1)
    with fake("tinycudann"):
        found = perceptron_results(arguments, "auto", loss_scale)
    assert_half(found, perceptron_results(arguments, "torch"))


def test_a_zero_gradient_stays_zero(fake):
    arguments = perceptron(20, 7, 10, 3)
    with fake("tinycudann"):
        (mlp(*arguments) * 0).sum().backward()
    assert all(v.grad is not None and not v.grad.any() for v in arguments)


def test_what_tinycudann_has_not_goes_by_device(fake):
    points, table, *_ = grid_problem(SMALL, 100)
    _, *weights = (v.detach() for v in perceptron(1, SMALL.width, 16, 1))
    with fake("tinycudann"):
        x = torch.randn(9, SMALL.width)
        numba = mlp_with_slope(x, *weights, backend="numba")
        assert all(torch.equal(a, b) for a, b in zip(mlp_with_slope(x, *weights), numba, strict=True))
        found = hash_density(points, table, SMALL, tuple(weights))
    assert_close(found, hash_density(points, table, SMALL, tuple(weights), backend="torch"), 2e-4)


def scene(device="cpu", views=2):
    import trimesh

    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.8)
    vertices = torch.tensor(ball.vertices, dtype=torch.float32) * torch.tensor([1.0, 0.7, 0.5])
    triangles = torch.tensor(ball.faces, dtype=torch.int32)
    clip = to_clip(vertices, orbit_views([13.0, 200.0][:views], 20.0), 37 / 30)
    return vertices.to(device), triangles.to(device), clip.to(device)


def picture(vertices, triangles, clip, backend, topology):
    """rast, interpolated positions, antialiased picture, and the gradients of a loss on the last by clip and colour."""
    clip, vertices = clip.clone().requires_grad_(), vertices.clone().requires_grad_()
    rast = rasterise(clip, triangles, 30, 37, backend=backend)
    inner = interpolate(vertices, rast, triangles, backend=backend)
    colour = torch.cat([inner, (rast[..., 3:] > 0).float()], -1)
    smooth = antialias(colour, rast, clip, triangles, topology, backend=backend)
    rows = torch.linspace(-1, 2, 30, device=clip.device)[:, None, None]  # a loss that knows top from bottom
    gradients = torch.autograd.grad((smooth.square() * rows).sum(), (clip, vertices))
    return [rast, inner, smooth, *gradients]


def test_nvdiffrast_pictures_and_gradients_are_ours(fake):
    vertices, triangles, clip = scene()
    topology = edge_topology(triangles, len(vertices))
    with fake("nvdiffrast"):
        found = picture(vertices, triangles, clip, "auto", topology)
    wanted = picture(vertices, triangles, clip, "torch", topology)
    assert torch.equal(found[0][..., 3], wanted[0][..., 3]) and bool((wanted[0][..., 3] > 0).any())
    assert not torch.equal(wanted[0].flip(1)[..., 3], wanted[0][..., 3])  # the scene has a top and a bottom
    assert_close(found, wanted, 1e-4)


def test_nvdiffrast_draws_row_0_at_the_top(fake):
    clip = torch.tensor([[[-1.0, 1.0, 0.25, 1.0], [-1.0, -1.0, 0.25, 1.0], [1.0, 1.0, 0.25, 1.0]]])
    with fake("nvdiffrast"):
        rast = rasterise(clip, torch.tensor([[0, 1, 2]], dtype=torch.int32), 4, 4)
    assert torch.equal(rast[0, ..., 3], torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]))
    torch.testing.assert_close(rast[0, 0, 0], torch.tensor([0.75, 0.125, 0.25, 1.0]))


def test_nvdiffrast_opens_one_context_a_device(fake, monkeypatch):
    _, triangles, clip = scene()
    monkeypatch.setattr(fake_kernels.RasterizeCudaContext, "opened", 0)
    with fake("nvdiffrast"):
        for _ in range(3):
            rasterise(clip, triangles, 8, 8)
    assert fake_kernels.RasterizeCudaContext.opened == 1


def test_nvdiffrast_texture_has_its_first_row_at_the_top_and_ours_at_its_edges(fake):
    g = torch.Generator().manual_seed(2)
    image = torch.randn(5, 7, 3, generator=g)
    odd = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-3.0, 0.5], [0.5, 9.0], [float("nan"), 0.5], [0.5, float("nan")]])
    uv = torch.cat([torch.rand(40, 2, generator=g), odd]).reshape(2, 23, 2)
    with fake("nvdiffrast"):
        found = texture(image, uv)
        top = texture(image, torch.tensor([0.5 / 7, 1 - 0.5 / 5]))
    assert_close([found], [texture(image, uv, backend="torch")], 1e-5)
    torch.testing.assert_close(top, image[0, 0])
    results = []
    for context in (fake("nvdiffrast"), selected(Selection("cpu", {"raster": "torch"}))):
        i, at = image.clone().requires_grad_(), uv[0].clone().requires_grad_()
        with context:
            (texture(i, at) * image[0, :1]).sum().backward()
        results.append([i.grad, at.grad])
    assert_close(*results, 1e-4)


def test_nvdiffrast_is_not_asked_about_nothing(fake):
    vertices, triangles, clip = scene()
    none = triangles[:0]
    with fake("nvdiffrast"):
        rast = rasterise(clip, none, 6, 5)
        assert rast.shape == (2, 6, 5, 4) and not rast.any()
        assert not interpolate(vertices, rast, none).any()
        colour = torch.rand(2, 6, 5, 3)
        assert torch.equal(antialias(colour, rast, clip, none, none), colour)
        assert rasterise(clip[:0], triangles, 6, 5).shape == (0, 6, 5, 4)
        assert texture(torch.rand(4, 4, 3), torch.zeros(0, 2)).shape == (0, 3)


def rotated(faces):
    """Faces that begin at their lowest corner."""
    first = faces.long().argmin(1, keepdim=True)
    return faces.long().gather(1, (first + torch.arange(3, device=faces.device)) % 3)


def lattice(device="cpu"):
    ball = from_function(Lattice(8), lambda p: p.norm(dim=-1) - 0.55)
    cells = (ball._edges, ball._tets, ball._tet_edges)
    return [v.detach().to(device) for v in (ball.positions(), ball.sdf, *cells)]


def surfaces(device="cpu"):
    """A ball, and noise with exact zeros."""
    positions, sdf, *cells = lattice(device)
    noise = torch.randn(len(sdf), generator=torch.Generator().manual_seed(1)).to(device)
    noise[::7] = 0
    return [(positions, values, *cells) for values in (sdf, noise)]


def marched(positions, sdf, cells, backend):
    p, s = positions.clone().requires_grad_(), sdf.clone().requires_grad_()
    vertices, faces, crossing = marching_tetrahedra(p, s, *cells, guard=0.01, backend=backend)
    gradients = torch.autograd.grad((vertices * vertices.detach().cos()).sum(), (p, s))
    return [vertices, *gradients], faces, crossing


def test_the_stand_in_for_kaolin_gives_the_example_of_its_documentation():
    vertices = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]])
    sdf = torch.tensor([[-1.0, -1, 0.5, 0.5]])
    (v,), (f,), (t,) = fake_kernels.marching_tetrahedra(vertices, torch.tensor([[0, 1, 2, 3]]), sdf, True)
    third = torch.tensor([[0, 2, 0], [0, 0, 2], [1, 2, 0], [1, 0, 2]]) / 3
    torch.testing.assert_close(v, third)
    assert rotated(f).tolist() == rotated(torch.tensor([[3, 0, 1], [3, 2, 0]])).tolist() and t.tolist() == [0, 0]


def test_kaolin_marches_as_ours_does(fake):
    for positions, sdf, *cells in surfaces():
        with fake("kaolin"):
            found, faces, crossing = marched(positions, sdf, cells, "auto")
        wanted, our_faces, our_crossing = marched(positions, sdf, cells, "torch")
        assert torch.equal(crossing, our_crossing) and crossing.dtype == faces.dtype == torch.int32
        assert torch.equal(rotated(faces), rotated(our_faces)) and len(faces) > 100
        assert_close(found, wanted, 1e-5)


def test_kaolin_with_edges_in_any_order_and_direction(fake):
    positions, sdf, edges, tets, tet_edges = lattice()
    order = torch.randperm(len(edges), generator=torch.Generator().manual_seed(4))
    cells = (edges[order].flip(1).contiguous(), tets, order.argsort().int()[tet_edges.long()])
    with fake("kaolin"):
        found, faces, crossing = marched(positions, sdf, cells, "auto")
    wanted, our_faces, our_crossing = marched(positions, sdf, cells, "torch")
    assert torch.equal(crossing, our_crossing) and torch.equal(rotated(faces), rotated(our_faces))
    assert_close(found, wanted, 1e-5)


def test_kaolin_where_nothing_crosses_and_where_an_edge_lies_in_no_tetrahedron(fake):
    positions, sdf, *cells = lattice()
    with fake("kaolin"):
        vertices, faces, crossing = marching_tetrahedra(positions, sdf.abs() + 1, *cells, guard=0.01)
        assert vertices.shape == (0, 3) and faces.shape == (0, 3) and crossing.shape == (0,)
        with pytest.raises(ValueError, match="every crossing edge in a tetrahedron"):
            marching_tetrahedra(positions, sdf, cells[0], cells[1][:5], cells[2][:5], guard=0.01)


def real(name):
    """Skip unless the package imports here."""
    forget()
    found = probe(name)
    if found.state != "ok":
        pytest.skip(f"{name}: {found.detail}")


@pytest.mark.cuda
def test_the_real_tinycudann_grid_is_ours():
    real("tinycudann")
    for spec in (SMALL, HashGridSpec(), HashGridSpec(levels=4, features=4, log2_table=12, base=5, finest=300)):
        arguments = grid_problem(spec, 5000, device="cuda")
        found = grid_results(*arguments, spec, "tinycudann")
        assert_close(found, grid_results(*arguments, spec, "torch"), 5e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("sizes", [(7, 10, 3), (32, 32, 1), (32, 64, 4), (5, 130, 17)])
def test_the_real_tinycudann_perceptron_is_ours_to_half_precision(sizes):
    real("tinycudann")
    for loss_scale in (1e-9, 1.0):
        arguments = perceptron(5000, *sizes, device="cuda")
        found = perceptron_results(arguments, "tinycudann", loss_scale)
        assert_half(found, perceptron_results(arguments, "torch"))


@pytest.mark.cuda
def test_the_real_nvdiffrast_draws_our_pictures():
    """Vertices are snapped to 1/16 pixel there, so pixels along edges may change hands."""
    real("nvdiffrast")
    vertices, triangles, clip = scene("cuda")
    topology = edge_topology(triangles, len(vertices))
    found = picture(vertices, triangles, clip, "nvdiffrast", topology)
    wanted = picture(vertices, triangles, clip, "torch", topology)
    same = found[0][..., 3] == wanted[0][..., 3]
    assert float(same.float().mean()) > 0.97
    for a, b in ((found[0], wanted[0]), (found[1], wanted[1])):
        torch.testing.assert_close(a[same], b[same], atol=1e-3, rtol=0)
    assert float((found[2] - wanted[2]).abs().mean()) < 5e-3
    for a, b in zip(found[3:], wanted[3:], strict=True):
        assert float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)) > 0.9


@pytest.mark.cuda
def test_the_real_nvdiffrast_looks_up_our_textures():
    real("nvdiffrast")
    g = torch.Generator().manual_seed(2)
    image, uv = torch.randn(33, 21, 3, generator=g).cuda(), (torch.rand(3000, 2, generator=g) * 1.4 - 0.2).cuda()
    results = []
    for backend in ("nvdiffrast", "torch"):
        i, at = image.clone().requires_grad_(), uv.clone().requires_grad_()
        out = texture(i, at, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), (i, at))])
    assert_close(*results, 1e-3)


@pytest.mark.cuda
def test_the_real_kaolin_marches_on_cuda_as_ours_does():
    real("kaolin")
    check_real_kaolin("cuda")


def test_the_real_kaolin_marches_on_the_cpu_as_ours_does():
    real("kaolin")
    check_real_kaolin("cpu")


def check_real_kaolin(device):
    """Two of its sixteen cases cut a quadrilateral along the other diagonal, so faces are not compared one by one."""
    for closed, (positions, sdf, *cells) in zip((True, False), surfaces(device), strict=True):
        found, faces, crossing = marched(positions, sdf, cells, "kaolin")
        wanted, our_faces, our_crossing = marched(positions, sdf, cells, "torch")
        assert torch.equal(crossing, our_crossing) and faces.shape == our_faces.shape
        assert_close(found, wanted, 1e-5)
        if closed:
            mesh_edges(faces, len(found[0]))  # raises unless the surface is closed and oriented
        volumes = [torch.linalg.det(found[0].detach()[f.long()].double()).sum() / 6 for f in (faces, our_faces)]
        torch.testing.assert_close(*volumes, rtol=1e-3, atol=1e-6)
