"""The kaolin adaptor: its mapping against a stand-in, and the package itself where it is."""

import pytest
import torch

from stages.kernels.marching import marching_tetrahedra, mesh_edges
from stages.mesh.tets.dmtet import from_function
from stages.mesh.tets.tetrahedra import Lattice
from tests.kernels.backends import fake_kernels
from tests.kernels.backends.adaptor_cases import assert_close, real, stand_ins


@pytest.fixture
def fake(monkeypatch):
    """fake(name): the backend of a stand-in in a package's place."""
    yield from stand_ins(monkeypatch)


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
            actual, faces, crossing = marched(positions, sdf, cells, "auto")
        expected, our_faces, our_crossing = marched(positions, sdf, cells, "torch")
        assert torch.equal(crossing, our_crossing) and crossing.dtype == faces.dtype == torch.int32
        assert torch.equal(rotated(faces), rotated(our_faces)) and len(faces) > 100
        assert_close(actual, expected, 1e-5)


def test_kaolin_with_edges_in_any_order_and_direction(fake):
    positions, sdf, edges, tets, tet_edges = lattice()
    order = torch.randperm(len(edges), generator=torch.Generator().manual_seed(4))
    cells = (edges[order].flip(1).contiguous(), tets, order.argsort().int()[tet_edges.long()])
    with fake("kaolin"):
        actual, faces, crossing = marched(positions, sdf, cells, "auto")
    expected, our_faces, our_crossing = marched(positions, sdf, cells, "torch")
    assert torch.equal(crossing, our_crossing) and torch.equal(rotated(faces), rotated(our_faces))
    assert_close(actual, expected, 1e-5)


def test_kaolin_where_nothing_crosses_and_where_an_edge_lies_in_no_tetrahedron(fake):
    positions, sdf, *cells = lattice()
    with fake("kaolin"):
        vertices, faces, crossing = marching_tetrahedra(positions, sdf.abs() + 1, *cells, guard=0.01)
        assert vertices.shape == (0, 3) and faces.shape == (0, 3) and crossing.shape == (0,)
        with pytest.raises(ValueError, match="every crossing edge in a tetrahedron"):
            marching_tetrahedra(positions, sdf, cells[0], cells[1][:5], cells[2][:5], guard=0.01)


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
        actual, faces, crossing = marched(positions, sdf, cells, "kaolin")
        expected, our_faces, our_crossing = marched(positions, sdf, cells, "torch")
        assert torch.equal(crossing, our_crossing) and faces.shape == our_faces.shape
        assert_close(actual, expected, 1e-5)
        if closed:
            mesh_edges(faces, len(actual[0]))  # raises unless the surface is closed and oriented
        volumes = [torch.linalg.det(actual[0].detach()[f.long()].double()).sum() / 6 for f in (faces, our_faces)]
        torch.testing.assert_close(*volumes, rtol=1e-3, atol=1e-6)
