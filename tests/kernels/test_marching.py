"""Marching tetrahedra: by hand, twin against compiled kernels, float64 differences, closedness on noise."""

import itertools
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from stages.kernels.cpu import marching as cpu_marching
from stages.kernels.marching import marching_tetrahedra, mesh_edges
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.mesh.tets.tetrahedra import Lattice, build_band
from tests.mesh.mesh_shapes import all_ids

BACKENDS = ("torch", "numba", *(["warp"] if find_spec("warp") else []))
CORNERS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
EDGES = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], dtype=torch.int32)
ONE = (EDGES, torch.arange(4, dtype=torch.int32)[None], torch.arange(6, dtype=torch.int32)[None])


@pytest.fixture(scope="module")
def cube():
    lattice = Lattice(8)
    band = build_band(lattice, all_ids(lattice))
    cells = tuple(torch.from_numpy(x) for x in (band.edges, band.tets, band.tet_edges))
    return torch.from_numpy(lattice.positions(band.ids)), cells, torch.from_numpy(band.border)


def noise(cube, seed: int, zeros: float = 0.0) -> torch.Tensor:
    positions, _, border = cube
    g = torch.Generator().manual_seed(seed)
    sdf = torch.randn(len(positions), generator=g)
    sdf[torch.rand(len(positions), generator=g) < zeros] = 0.0
    return torch.where(border, sdf.abs(), sdf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_corner_inside_gives_one_triangle_facing_away_from_it(backend):
    sdf = torch.tensor([-1.0, 1, 1, 3])
    v, f, edge = marching_tetrahedra(CORNERS, sdf, *ONE, guard=1e-9, backend=backend)
    torch.testing.assert_close(v, torch.tensor([[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.25]]))
    assert f.tolist() == [[0, 1, 2]] and edge.tolist() == [0, 1, 2] and f.dtype == torch.int32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inside", list(itertools.product([False, True], repeat=4)))
def test_every_case_separates_inside_from_outside_and_faces_outwards(inside, backend):
    sdf = torch.tensor([-1.0 if i else 1.0 for i in inside])
    v, f, _ = marching_tetrahedra(CORNERS, sdf, *ONE, guard=1e-6, backend=backend)
    k = sum(inside)
    assert len(f) == {0: 0, 1: 1, 2: 2, 3: 1, 4: 0}[k] and len(v) == {0: 0, 1: 3, 2: 4, 3: 3, 4: 0}[k]
    for a, b, c in v[f.long()]:
        normal = torch.linalg.cross(b - a, c - a)
        side = (CORNERS - a) @ normal
        assert (side[sdf < 0] < 0).all() and (side[sdf > 0] > 0).all()


@pytest.mark.parametrize("seed", range(12))
def test_random_signs_with_exact_zeros_give_a_solid(cube, seed):
    positions, cells, _ = cube
    sdf = noise(cube, seed, zeros=0.3 * (seed % 2))
    v, f, _ = marching_tetrahedra(positions, sdf, *cells, guard=1e-3)
    report = measure(Mesh(v.numpy(), f.numpy()))
    assert report.solid and report.faces > 3000, report
    if seed % 2 == 0:
        assert report.degenerate_faces == 0
    edges, _ = mesh_edges(f, len(v))
    assert len(edges) * 2 == len(f) * 3


@pytest.mark.parametrize("seed", [0, 1])
def test_every_backend_agrees_forward_and_backward(cube, seed):
    positions, cells, _ = cube
    sdf = noise(cube, seed, zeros=0.2 * seed)
    actual = []
    for backend in BACKENDS:
        p, s = positions.clone().requires_grad_(), sdf.clone().requires_grad_()
        v, f, edge = marching_tetrahedra(p, s, *cells, guard=0.01, backend=backend)
        (v * torch.randn(v.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        actual.append((v.detach(), f, edge, p.grad, s.grad))
    (v0, f0, e0, p0, s0), *others = actual
    for v1, f1, e1, p1, s1 in others:
        assert torch.equal(f0, f1) and torch.equal(e0, e1)
        torch.testing.assert_close(v0, v1, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(p0, p1, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(s0, s1, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_match_float64_differences_of_the_twin(cube, backend):
    positions, cells, _ = cube
    sdf = noise(cube, 5)
    p, s = positions.clone().requires_grad_(), sdf.clone().requires_grad_()
    v, _, _ = marching_tetrahedra(p, s, *cells, guard=0.05, backend=backend)
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(2))
    (v * weight).sum().backward()
    p64, s64, w64 = positions.double(), sdf.double(), weight.double()

    def value(p_, s_):
        return float((marching_tetrahedra(p_, s_, *cells, guard=0.05, backend="torch")[0] * w64).sum())

    h, g = 1e-6, torch.Generator().manual_seed(3)
    for _ in range(4):  # directions; a step of 1e-6 changes no sign here
        dp, ds = torch.randn(p64.shape, generator=g).double(), torch.randn(s64.shape, generator=g).double()
        numeric = (value(p64 + h * dp, s64 + h * ds) - value(p64 - h * dp, s64 - h * ds)) / (2 * h)
        analytic = float((p.grad.double() * dp).sum() + (s.grad.double() * ds).sum())
        assert abs(numeric - analytic) < 1e-4 * max(1, abs(numeric))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exact_zero_is_outside_gets_a_gradient_and_makes_no_degenerate_face(backend):
    sdf = torch.tensor([-1.0, 0, 0, 0], requires_grad=True)
    v, f, _ = marching_tetrahedra(CORNERS, sdf, *ONE, guard=1e-3, backend=backend)
    v[:, 0].sum().backward()
    assert len(f) == 1 and torch.isfinite(v).all() and v[0, 0] < 1
    assert torch.isfinite(sdf.grad).all() and sdf.grad[1] != 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_distances_on_both_ends_meet_in_the_middle_with_bounded_gradient(backend):
    sdf = torch.tensor([-1e-30, 1e-30, 1e-30, 1e-30], requires_grad=True)
    v, _, _ = marching_tetrahedra(CORNERS, sdf, *ONE, guard=1e-3, backend=backend)
    torch.testing.assert_close(v, torch.eye(3) * 0.5)
    v.sum().backward()
    assert sdf.grad.abs().max() <= 3 * 0.25 / 1e-3 * 1.01  # three edges of length 1


def tetrahedron_faces():
    return torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges_of_a_tetrahedron_by_hand(backend):
    edges, sides = mesh_edges(tetrahedron_faces(), 4, backend=backend)
    assert edges.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert sides.tolist() == [[1, 0], [0, 2], [2, 1], [3, 0], [1, 3], [3, 2]]


def test_edges_agree_between_backends_on_noise(cube):
    positions, cells, _ = cube
    v, f, _ = marching_tetrahedra(positions, noise(cube, 3), *cells, guard=1e-3)
    want, *others = (mesh_edges(f, len(v), backend=backend) for backend in BACKENDS)
    for actual in others:
        for a, b in zip(actual, want, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", ["open", "flipped", "doubled", "odd"])
def test_edges_refuse_a_surface_that_is_not_closed_and_oriented(fault, backend):
    faces = tetrahedron_faces()
    if fault == "open":
        faces = faces[:2]
    elif fault == "odd":
        faces = faces[:3]
    elif fault == "flipped":
        faces[0] = faces[0].flip(0)
    else:
        faces = torch.cat([faces, faces])
    with pytest.raises(ValueError, match="closed oriented"):
        mesh_edges(faces, 4, backend=backend)


def test_arguments_are_checked():
    sdf = torch.ones(4)
    with pytest.raises(ValueError, match="guard"):
        marching_tetrahedra(CORNERS, sdf, *ONE, guard=0.0)
    with pytest.raises(ValueError, match="sdf: wanted shape"):
        marching_tetrahedra(CORNERS, sdf[:3], *ONE, guard=1e-3)
    with pytest.raises(ValueError, match=r"edges: wanted indices in \[0, 4\), got 0 to 4"):
        marching_tetrahedra(CORNERS, sdf, EDGES + (EDGES == 3), *ONE[1:], guard=1e-3)
    with pytest.raises(ValueError, match=r"tets: wanted indices in \[0, 4\), got 1 to 4"):
        marching_tetrahedra(CORNERS, sdf, EDGES, ONE[1] + 1, ONE[2], guard=1e-3)
    with pytest.raises(ValueError, match=r"tet_edges: wanted indices in \[0, 6\), got -1 to 4"):
        marching_tetrahedra(CORNERS, sdf, *ONE[:2], ONE[2] - 1, guard=1e-3)
    with pytest.raises(ValueError, match=r"faces: wanted indices in \[0, 3\), got 0 to 3"):
        mesh_edges(tetrahedron_faces(), 3)
    with pytest.raises(ValueError, match="backend"):
        marching_tetrahedra(CORNERS, sdf, *ONE, guard=1e-3, backend="cuda")


def test_kernel_gives_the_same_bytes_twice(cube):
    positions, cells, _ = cube
    arrays = [x.numpy() for x in (positions, noise(cube, 7), *cells)]
    first, second = (cpu_marching.march(*arrays, 1e-3) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_the_ops_work_inside_torch_compile(cube, backend):
    positions, cells, _ = cube

    def value(p, s):
        v, f, _ = marching_tetrahedra(p * 2, s + 0.1, *cells, guard=0.01, backend=backend)
        edges, _ = mesh_edges(f, len(v), backend=backend)
        return (v[edges[:, 0].long()] - v[edges[:, 1].long()]).square().sum()

    actual = []
    for function in (value, torch.compile(value, backend="aot_eager")):
        p, s = positions.clone().requires_grad_(), noise(cube, 4).requires_grad_()
        out = function(p, s)
        actual.append((out, *torch.autograd.grad(out, (p, s))))
    for got, want in zip(*actual, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
