"""Smoothness terms: by hand, invariances, and gradients against float64 differences."""

import math

import numpy as np
import pytest
import torch
from mesh_shapes import box, noisy_blob, sphere, tetrahedron

from stages.kernels.marching import mesh_edges
from stages.mesh.regularise import laplacian, normal_consistency

KINDS = ("face", "vertex")


def tensors(mesh, dtype=torch.float32):
    faces = torch.from_numpy(mesh.faces)
    return torch.from_numpy(mesh.vertices).to(dtype), faces, *mesh_edges(faces, len(mesh.vertices))


def test_face_consistency_of_a_cube_by_hand():
    v, f, e, s = tensors(box())
    # 12 sharp edges with 1 - cos 90 deg = 1 and 6 diagonals with 0; all twelve faces have the same area
    assert float(normal_consistency(v, f, e, s, kind="face")) == pytest.approx(12 / 18)


def test_face_consistency_of_a_regular_tetrahedron_is_one_minus_cosine_of_its_exterior_angle():
    mesh = tetrahedron()
    v, f, e, s = tensors(mesh)
    v = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    f = f.flip(1) if mesh.signed_volume() < 0 else f
    assert float(normal_consistency(v, f, *mesh_edges(f, 4), kind="face")) == pytest.approx(1 + 1 / 3)


def test_vertex_consistency_of_a_regular_tetrahedron():
    v, f, e, s = tensors(tetrahedron())
    v = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    assert float(normal_consistency(v, f, e, s, kind="vertex")) == pytest.approx(1 + 1 / 3)  # normals (1, 1, 1), ...


def test_laplacian_of_a_regular_tetrahedron_by_hand():
    v, f, e, _ = tensors(tetrahedron())
    v = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    # the other three have the mean -v / 3; distance 4/3 * sqrt(3), edges sqrt(8), and it is all normal
    wanted = (4 / 3 * math.sqrt(3) / math.sqrt(8)) ** 2
    assert float(laplacian(v, f, e, tangential=True)) == pytest.approx(wanted)
    assert float(laplacian(v, f, e)) == pytest.approx(wanted)


def test_a_flat_patch_costs_nothing_but_uneven_spacing_counts_as_tangential():
    rng = np.random.default_rng(0)
    mesh = sphere(n=16, m=32)
    flat = mesh.vertices[:, 1] > 0.45  # the upper cap becomes a disc with unevenly spaced vertices
    mesh.vertices[flat, 1] = 0.45
    mesh.vertices[np.ix_(flat, [0, 2])] += rng.normal(0, 0.003, (flat.sum(), 2))
    v, f, e, _ = tensors(mesh)
    inner = torch.from_numpy(flat)
    for _ in range(2):  # a vertex's own term and its neighbours' are those of a plane
        off = ~inner
        inner = inner.clone()
        inner[e.long()[off[e.long()].any(1)].reshape(-1)] = False
    assert inner.sum() > 50
    gradients = []
    for tangential in (False, True):
        leaf = v.clone().requires_grad_()
        laplacian(leaf, f, e, tangential=tangential).backward()
        gradients.append(leaf.grad[inner].norm(dim=1))
    assert gradients[0].max() < 1e-6 * gradients[1].median()


@pytest.mark.parametrize("kind", KINDS)
def test_terms_do_not_depend_on_size_place_and_turn(kind):
    v, f, e, s = tensors(noisy_blob(12), torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    turn = turn * torch.sign(torch.linalg.det(turn))
    moved = 0.3 * v @ turn.T + torch.tensor([0.1, -0.2, 0.3])
    a, b = (normal_consistency(x, f, e, s, kind=kind) for x in (v, moved))
    assert float(a) == pytest.approx(float(b), rel=1e-9)
    for tangential in (False, True):
        a, b = (laplacian(x, f, e, tangential=tangential) for x in (v, moved))
        assert float(a) == pytest.approx(float(b), rel=1e-9)


def test_terms_rank_smooth_below_rough():
    smooth, rough = tensors(sphere()), tensors(noisy_blob(16))
    for kind in KINDS:
        assert normal_consistency(*smooth, kind=kind) < 0.2 * normal_consistency(*rough, kind=kind)
    assert laplacian(*smooth[:3]) < 0.2 * laplacian(*rough[:3])


def detached_reference(v, v0, f, e, s, name):
    """The terms in plain loops over edges, with what the module holds constant taken at v0."""
    fl = f.long()

    def cross(x):
        a, b, c = x[fl].unbind(1)
        return torch.linalg.cross(b - a, c - a)

    n = cross(v)
    if name == "face":
        area = cross(v0).norm(dim=1)
        weight = torch.minimum(area[s[:, 0].long()], area[s[:, 1].long()])
        unit = n / n.norm(dim=1, keepdim=True)
        total = sum(w * (1 - unit[i] @ unit[j]) for w, (i, j) in zip(weight, s.tolist()))
        return total / weight.sum()

    def vertex_sum(normals, count):
        rows = [torch.zeros(3, dtype=v.dtype) for _ in range(count)]
        for face, normal in zip(fl.tolist(), normals):
            for k in face:
                rows[k] = rows[k] + normal
        return torch.stack(rows)

    if name == "vertex":
        unit = torch.nn.functional.normalize(vertex_sum(n, len(v)), dim=1)
        return sum(1 - unit[i] @ unit[j] for i, j in e.tolist()) / len(e)
    around = {i: [] for i in range(len(v))}
    for i, j in e.tolist():
        around[i].append(j)
        around[j].append(i)
    length = torch.stack([(v0[i] - v0[j]).norm() for i, j in e.tolist()]).mean()
    delta = torch.stack([torch.stack([v[j] for j in around[i]]).mean(0) - v[i] for i in range(len(v))]) / length
    if name == "normal":
        normals = torch.nn.functional.normalize(vertex_sum(cross(v0), len(v)), dim=1)
        return ((delta * normals).sum(1) ** 2).mean()
    return (delta**2).sum(1).mean()


TERMS = {
    "face": lambda v, f, e, s: normal_consistency(v, f, e, s, kind="face"),
    "vertex": lambda v, f, e, s: normal_consistency(v, f, e, s, kind="vertex"),
    "normal": lambda v, f, e, s: laplacian(v, f, e),
    "full": lambda v, f, e, s: laplacian(v, f, e, tangential=True),
}


@pytest.mark.parametrize("name", TERMS)
def test_values_and_gradients_match_float64_differences_of_a_slow_reference(name):
    mesh = sphere(n=5, m=4)
    mesh.vertices += np.random.default_rng(0).normal(0, 0.05, mesh.vertices.shape).astype(np.float32)
    v, f, e, s = tensors(mesh)
    v64 = v.double()
    leaf = v.clone().requires_grad_()
    loss = TERMS[name](leaf, f, e, s)
    loss.backward()
    assert float(loss) == pytest.approx(float(detached_reference(v64, v64, f, e, s, name)), rel=1e-5)
    g, h = torch.Generator().manual_seed(1), 1e-6
    for _ in range(3):
        d = torch.randn(v.shape, generator=g).double()
        numeric = float(
            detached_reference(v64 + h * d, v64, f, e, s, name) - detached_reference(v64 - h * d, v64, f, e, s, name)
        ) / (2 * h)
        assert float((leaf.grad.double() * d).sum()) == pytest.approx(numeric, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_slivers_and_faces_without_area_give_finite_values_and_gradients(name):
    v, f, e, s = tensors(sphere(n=12, m=8))
    v = v.clone()
    v[5], v[20] = v[6], v[21] + 1e-7
    v = v.requires_grad_()
    TERMS[name](v, f, e, s).backward()
    assert torch.isfinite(v.grad).all()


def test_slivers_do_not_dominate_the_gradient_of_the_face_term():
    """Two nearly equal vertices: an unweighted mean over edges would give them a gradient of order 1 / distance."""
    v, f, e, s = tensors(sphere(n=24, m=12))
    plain = v.clone().requires_grad_()
    normal_consistency(plain, f, e, s).backward()
    pinched = v.clone()
    i, j = e[100].tolist()
    pinched[j] = pinched[i] + 1e-4 * (pinched[j] - pinched[i])
    pinched = pinched.requires_grad_()
    normal_consistency(pinched, f, e, s).backward()
    assert pinched.grad.norm(dim=1).max() < 20 * plain.grad.norm(dim=1).max()


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind"):
        normal_consistency(*tensors(box()), kind="edge")
