"""The Warp kernels of meshes: tiles, sums without an order, PTX without a GPU, float64 differences; on CUDA if there.

That they agree with the twins is in test_kernels_sizes.py (random inputs) and test_kernels_raster.py, _marching.py and
_lattice.py (worked cases), which run them on Warp's CPU device.
"""

import importlib
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trimesh

from stages.cameras import orbit_views, to_clip
from stages.kernels.marching import marching_tetrahedra, mesh_edges
from stages.kernels.raster import antialias, edge_topology, interpolate, rasterise, texture, vertex_normals
from stages.kernels.reference import raster as reference_raster
from stages.kernels.smoothness import smoothness
from stages.mesh.tets.tetrahedra import Lattice, build_band
from tests.mesh.mesh_shapes import all_ids

wp = pytest.importorskip("warp")

from stages.kernels.cuda import raster as cuda_raster  # noqa: E402
from stages.kernels.cuda import sums as cuda_sums  # noqa: E402
from stages.kernels.cuda.launch import launch  # noqa: E402

MODULES = ("raster", "antialias", "texture", "normals", "marching", "lattice", "smoothness", "lambert")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def sphere(subdivisions: int, device: str = "cpu"):
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.8)
    vertices = torch.tensor(mesh.vertices, dtype=torch.float32) * torch.tensor([1.0, 0.7, 0.5])
    return vertices.to(device), torch.tensor(mesh.faces, dtype=torch.int32, device=device)


def wide_soup(seed: int, triangles: int = 12):
    """Triangles from slivers to some that cover the image several times over."""
    g = torch.Generator().manual_seed(seed)
    size = torch.logspace(-1, 1, triangles).repeat_interleave(3)[:, None]
    clip = torch.randn(2, 3 * triangles, 4, generator=g) * size
    clip[..., 2] = torch.rand(2, 3 * triangles, generator=g) - 0.5
    clip[..., 3] = 1.0 + torch.rand(2, 3 * triangles, generator=g)
    return clip, torch.arange(3 * triangles, dtype=torch.int32).view(-1, 3)


@DEVICES
@pytest.mark.parametrize("seed", range(3))
def test_triangles_of_many_tiles_are_drawn_as_on_the_cpu(seed, device):
    clip, triangles = wide_soup(seed)
    want = rasterise(clip, triangles, 70, 131, backend="numba")
    got = rasterise(clip.to(device), triangles.to(device), 70, 131, backend="warp").cpu()
    wrong = got[..., 3] != want[..., 3]
    assert wrong.float().mean() < 1e-4
    torch.testing.assert_close(got[~wrong], want[~wrong], atol=1e-6, rtol=0)
    assert len(want[..., 3].unique()) > 6


@pytest.mark.parametrize("workers", [1, 7, 5000])
def test_the_picture_does_not_depend_on_how_many_workers_share_the_tiles(workers, monkeypatch):
    clip, triangles = wide_soup(4)
    want = rasterise(clip, triangles, 70, 131, backend="warp")
    monkeypatch.setitem(cuda_raster.WORKERS, "cpu", workers)
    assert torch.equal(rasterise(clip, triangles, 70, 131, backend="warp"), want)


def test_the_order_of_the_triangles_only_renames_them():
    vertices, triangles = sphere(3)
    clip = to_clip(vertices, orbit_views([20.0, 200.0]))
    order = torch.randperm(len(triangles), generator=torch.Generator().manual_seed(0))
    want = rasterise(clip, triangles, 40, 40, backend="warp")
    got = rasterise(clip, triangles[order], 40, 40, backend="warp")
    assert torch.equal(got[..., :3], want[..., :3])
    ids = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
    assert torch.equal(ids[got[..., 3].long()], want[..., 3].long())


def test_depths_closer_than_a_step_count_as_equal_and_the_far_plane_is_drawn():
    corners = torch.tensor([[-1.0, 1.0], [-1.0, -3.0], [3.0, 1.0]])
    depth = torch.tensor([1.0, 1.0, 1.0, 1.0 - 2.0**-24, 1.0 - 2.0**-24, 1.0 - 2.0**-24])[:, None]
    clip = torch.cat([corners.repeat(2, 1), depth, torch.ones(6, 1)], 1)[None]
    triangles = torch.arange(6, dtype=torch.int32).view(2, 3)
    assert (rasterise(clip, triangles, 4, 5, backend="warp")[..., 3] == 2).all()
    assert (rasterise(clip, triangles[:1], 4, 5, backend="warp")[..., 3] == 1).all()


@wp.kernel(enable_backward=False)
def _scatter(
    places: wp.array(dtype=wp.int32),
    terms: wp.array(dtype=wp.float64),
    peak: wp.array(dtype=wp.float32),
    total: wp.array(dtype=wp.int64),
    unit: wp.float64,
):
    n = wp.tid()
    cuda_sums.add(peak, total, unit, places[n], terms[n])


def summed(places: torch.Tensor, terms: torch.Tensor, count: int) -> torch.Tensor:
    def run(peak, total, unit):
        launch(_scatter, len(places), (places, terms, peak, total, unit))

    return cuda_sums.collect((count,), len(places), places.device, run)


@DEVICES
def test_sums_have_the_same_bytes_in_every_order_and_are_those_of_exact_arithmetic(device):
    g = torch.Generator().manual_seed(0)
    places = torch.randint(0, 20, (4000,), generator=g).int()
    scale = 10.0 ** torch.linspace(-30, 30, 20, dtype=torch.float64)  # every place has a size of its own
    terms = torch.randn(4000, generator=g, dtype=torch.float64) * scale[places.long()]
    got = summed(places.to(device), terms.to(device), 21).cpu()
    for _ in range(3):
        order = torch.randperm(4000, generator=g)
        assert torch.equal(summed(places[order].to(device), terms[order].to(device), 21).cpu(), got)
    for k in range(20):
        mine = terms[places == k]
        assert abs(got[k].item() - math.fsum(mine.tolist())) <= len(mine) * 2.0**-45 * mine.abs().max().item()
    assert got[20] == 0


@DEVICES
def test_a_sum_with_a_term_that_is_not_finite_is_nan_and_the_others_stay(device):
    bad = [math.nan, math.inf, -math.inf, 1e300]  # the last one exceeds float32
    places = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4], dtype=torch.int32, device=device)
    terms = torch.tensor([*bad, 2.0, 1.0, 1.0, 1.0, 1.0, -0.5], dtype=torch.float64, device=device)
    got = summed(places, terms, 5).cpu()
    assert got[:4].isnan().all() and got[4] == 1.5


def test_a_result_that_cannot_be_numbered_is_refused():
    with pytest.raises(ValueError, match="wanted fewer than 2147483648 values"):
        cuda_sums.collect((1 << 16, 1 << 15), 1, torch.device("cpu"), lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_to_ptx_without_a_gpu(module, tmp_path):
    name = f"stages.kernels.cuda.{module}"
    kernels = wp.get_module(name).kernels if importlib.import_module(name) else {}
    wp.compile_aot_module(name, arch=[80, 90], use_ptx=True, module_dir=tmp_path)
    for arch in (80, 90):
        (path,) = tmp_path.glob(f"*.sm{arch}.ptx")
        text = path.read_bytes().decode(errors="replace")
        assert f".target sm_{arch}" in text
        entries = [line for line in text.splitlines() if ".entry" in line]
        assert len(kernels) == len(entries) > 0
        assert "fma.rn.f" not in text  # rounds as the twin does
        if module == "raster":
            assert "atom.global.min.s64" in text  # one native instruction, not a loop
        if module in ("raster", "antialias", "texture", "marching", "smoothness"):
            assert re.search(r"(atom|red)\.global\.add\.u64", text)
        assert not re.search(r"(atom|red)\.global\.add\.(noftz\.)?f", text)  # whose order would show in the bytes


@pytest.mark.slow
def test_importing_the_public_ops_does_not_import_warp():
    code = (
        "import sys, stages.kernels.raster, stages.kernels.marching, stages.kernels.lattice\n"
        "assert 'warp' not in sys.modules and 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[3], check=True)


def scene(device: str):
    """A sphere from two views: vertices, triangles, clip, attributes, rast, topology."""
    vertices, triangles = sphere(1)
    g = torch.Generator().manual_seed(0)
    vertices = vertices + 0.02 * torch.randn(vertices.shape, generator=g)  # no crossing on a border between pixels
    clip = to_clip(vertices, orbit_views([20.0, 130.0]))
    attributes = torch.rand(len(vertices), 3, generator=g)
    rast = rasterise(clip, triangles, 12, 13, backend="torch")
    topology = edge_topology(triangles, len(vertices), backend="torch")
    return [t.to(device) for t in (vertices, triangles, clip, attributes, rast, topology)]


def functions(device: str):
    """name -> (leaves, function of them under a backend); coverage is held still, as the derivative is defined."""
    vertices, triangles, clip, attributes, rast, topology = scene(device)
    ids = rast[..., 3].long() - 1
    g = torch.Generator().manual_seed(1)
    colour = torch.rand(2, 12, 13, 2, generator=g).to(device)
    image, uv = torch.rand(6, 5, 2, generator=g).to(device), (torch.rand(40, 2, generator=g) * 1.2 - 0.1).to(device)

    def inside(c, a, backend):
        if backend == "torch":
            u, v = reference_raster.barycentrics(c, triangles, ids)
            planes = torch.stack([u, v, rast[..., 2].to(u), rast[..., 3].to(u)], -1)
            return interpolate(a, planes, triangles, backend="torch")
        return interpolate(a, rasterise(c, triangles, 12, 13, backend=backend), triangles, backend=backend)

    def silhouettes(p, c, backend):
        return antialias(c, rast.to(c), p, triangles, topology, backend=backend)

    return {
        "inside": ((clip, attributes), inside),
        "silhouettes": ((clip, colour), silhouettes),
        "texture": ((image, uv), texture),
        "normals": ((vertices,), lambda v, backend: vertex_normals(v, triangles, backend=backend)),
    }


@DEVICES
@pytest.mark.parametrize("name", ["inside", "silhouettes", "texture", "normals"])
def test_gradients_match_float64_differences(name, device):
    leaves, function = functions(device)[name]
    copies = [leaf.clone().requires_grad_() for leaf in leaves]
    g = torch.Generator().manual_seed(2)
    out = function(*copies, backend="warp")
    weight = torch.randn(out.shape, generator=g).to(device)
    grads = torch.autograd.grad(out, copies, weight)
    doubles = [leaf.double() for leaf in leaves]

    def value(step: float, moves: list[torch.Tensor]) -> float:
        moved = [d + step * m for d, m in zip(doubles, moves, strict=True)]
        return float((function(*moved, backend="torch") * weight.double()).sum())

    for _ in range(4):
        moves = [torch.randn(leaf.shape, generator=g).double().to(device) for leaf in leaves]
        numeric = (value(1e-7, moves) - value(-1e-7, moves)) / 2e-7
        analytic = sum(float((m * grad.double()).sum()) for m, grad in zip(moves, grads, strict=True))
        assert numeric == pytest.approx(analytic, rel=2e-4, abs=2e-4)


@pytest.mark.cuda
def test_a_whole_picture_on_cuda_has_the_cpu_pixels_and_the_same_gradient_bytes_twice():
    """Fifty thousand triangles at 512 x 512 from two views, through rasterise, interpolate and antialias."""
    views = orbit_views([20.0, 140.0], 20.0)

    def picture(device, backend):
        vertices, triangles = sphere(6, device)
        triangles = triangles[:50_000]
        leaf = vertices.requires_grad_()
        clip = to_clip(leaf, views.to(device))
        rast = rasterise(clip, triangles, 512, 512, backend=backend)
        normals = vertex_normals(leaf, triangles, backend=backend)
        planes = interpolate(torch.cat([leaf, normals], 1), rast, triangles, backend=backend)
        topology = edge_topology(triangles, len(vertices), backend=backend)
        smooth = antialias(planes, rast, clip, triangles, topology, backend=backend)
        weight = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0)).to(device)
        (grad,) = torch.autograd.grad(smooth, leaf, weight)
        return rast.detach().cpu(), smooth.detach().cpu(), grad.cpu()

    rast, smooth, grad = picture("cuda", "warp")
    again = picture("cuda", "warp")
    assert all(torch.equal(a, b) for a, b in zip((rast, smooth, grad), again, strict=True))
    want_rast, want_smooth, want_grad = picture("cpu", "numba")
    same = rast[..., 3] == want_rast[..., 3]
    assert (~same).float().mean() < 1e-4
    assert ((smooth - want_smooth).abs().amax(-1) > 1e-4).float().mean() < 1e-4
    assert (grad - want_grad).norm() < 1e-3 * want_grad.norm()


@pytest.mark.cuda
def test_a_step_on_cuda_waits_for_the_device_at_known_places_only():
    """Of the mesh ops, marching waits once for the number of faces, and mesh_edges to refuse an open surface."""
    lattice = Lattice(12)
    band = build_band(lattice, all_ids(lattice))
    cells = [torch.from_numpy(x).cuda() for x in (band.edges, band.tets, band.tet_edges)]
    positions = torch.from_numpy(lattice.positions(band.ids)).cuda()
    sdf = (positions.norm(dim=1) - 0.6).requires_grad_()

    def surface():
        return marching_tetrahedra(positions, sdf, *cells, guard=1e-3, backend="warp")

    vertices, triangles, _ = surface()
    edges, sides = mesh_edges(triangles, len(vertices), backend="warp")
    leaf = vertices.detach().requires_grad_()
    clip = to_clip(vertices, orbit_views([20.0]).to("cuda")).detach().requires_grad_()
    for mode in ("default", "error"):  # the first round compiles and allocates
        torch.cuda.set_sync_debug_mode(mode)
        try:
            rast = rasterise(clip, triangles, 64, 64, backend="warp")
            planes = interpolate(vertices.detach(), rast, triangles, backend="warp")
            topology = edge_topology(triangles, len(vertices), backend="warp")
            antialias(planes, rast, clip, triangles, topology, backend="warp").sum().backward()
            vertex_normals(vertices.detach(), triangles, backend="warp")
            torch.stack(smoothness(leaf, triangles, edges, sides, backend="warp")).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert clip.grad.isfinite().all()
