"""Smoothness of a surface: by hand, invariances, gradients against float64 differences, compiled against the twin."""

import math

import numpy as np
import pytest
import torch

from stages.kernels.marching import mesh_edges
from stages.kernels.smoothness import smoothness
from tests.mesh.mesh_shapes import box, noisy_blob, sphere, tetrahedron

TERMS = ("bend", "rough")
BACKENDS = ("torch", "numba")


def tensors(mesh, dtype=torch.float32):
    faces = torch.from_numpy(mesh.faces)
    return torch.from_numpy(mesh.vertices).to(dtype), faces, *mesh_edges(faces, len(mesh.vertices))


def term(name, *mesh, backend="auto"):
    return smoothness(*mesh, backend=backend)[TERMS.index(name)]


def regular_tetrahedron():
    mesh = tetrahedron()
    v = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    f = torch.from_numpy(mesh.faces)
    f = f.flip(1) if mesh.signed_volume() < 0 else f
    return v, f, *mesh_edges(f, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bend_of_a_cube_by_hand(backend):
    # 12 sharp edges with 1 - cos 90 deg = 1 and 6 diagonals with 0; all twelve faces have the same area
    assert float(term("bend", *tensors(box()), backend=backend)) == pytest.approx(12 / 18)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bend_of_a_regular_tetrahedron_is_one_minus_cosine_of_its_exterior_angle(backend):
    assert float(term("bend", *regular_tetrahedron(), backend=backend)) == pytest.approx(1 + 1 / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_roughness_of_a_regular_tetrahedron_by_hand(backend):
    # the other three have the mean -v / 3; distance 4/3 * sqrt(3), edges sqrt(8), and it is all normal
    expected = (4 / 3 * math.sqrt(3) / math.sqrt(8)) ** 2
    assert float(term("rough", *regular_tetrahedron(), backend=backend)) == pytest.approx(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uneven_spacing_on_a_flat_patch_is_not_rough(backend):
    rng = np.random.default_rng(0)
    mesh = sphere(n=16, m=32)
    flat = mesh.vertices[:, 1] > 0.45  # the upper cap becomes a disc with unevenly spaced vertices
    mesh.vertices[flat, 1] = 0.45
    mesh.vertices[np.ix_(flat, [0, 2])] += rng.normal(0, 0.003, (flat.sum(), 2))
    v, f, e, s = tensors(mesh)
    inner = torch.from_numpy(flat)
    for _ in range(2):  # a vertex's own term and its neighbours' are those of a plane
        off = ~inner
        inner = inner.clone()
        inner[e.long()[off[e.long()].any(1)].reshape(-1)] = False
    assert inner.sum() > 50
    leaf = v.clone().requires_grad_()
    term("rough", leaf, f, e, s, backend=backend).backward()
    size = leaf.grad.norm(dim=1)
    assert size[inner].max() < 1e-5 * size[~inner].median()


@pytest.mark.parametrize("name", TERMS)
def test_terms_do_not_depend_on_size_place_and_turn(name):
    v, f, e, s = tensors(noisy_blob(12), torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    turn = turn * torch.sign(torch.linalg.det(turn))
    moved = 0.3 * v @ turn.T + torch.tensor([0.1, -0.2, 0.3])
    assert float(term(name, v, f, e, s)) == pytest.approx(float(term(name, moved, f, e, s)), rel=1e-9)


@pytest.mark.parametrize("name", TERMS)
def test_terms_rank_smooth_below_rough(name):
    assert term(name, *tensors(sphere())) < 0.2 * term(name, *tensors(noisy_blob(16)))


def detached_reference(v, v0, f, e, s, name):
    """The terms in plain loops over edges, with what the op holds constant taken at v0."""
    fl = f.long()

    def cross(x):
        a, b, c = x[fl].unbind(1)
        return torch.linalg.cross(b - a, c - a)

    n = cross(v)
    if name == "bend":
        area = cross(v0).norm(dim=1)
        weight = torch.minimum(area[s[:, 0].long()], area[s[:, 1].long()])
        unit = n / n.norm(dim=1, keepdim=True)
        total = sum(w * (1 - unit[i] @ unit[j]) for w, (i, j) in zip(weight, s.tolist()))
        return total / weight.sum()
    rows = [torch.zeros(3, dtype=v.dtype) for _ in range(len(v))]
    for face, normal in zip(fl.tolist(), cross(v0)):
        for k in face:
            rows[k] = rows[k] + normal
    normals = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    around = {i: [] for i in range(len(v))}
    for i, j in e.tolist():
        around[i].append(j)
        around[j].append(i)
    length = torch.stack([(v0[i] - v0[j]).norm() for i, j in e.tolist()]).mean()
    delta = torch.stack([torch.stack([v[j] for j in around[i]]).mean(0) - v[i] for i in range(len(v))]) / length
    return ((delta * normals).sum(1) ** 2).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TERMS)
def test_values_and_gradients_match_float64_differences_of_a_slow_reference(name, backend):
    mesh = sphere(n=5, m=4)
    mesh.vertices += np.random.default_rng(0).normal(0, 0.05, mesh.vertices.shape).astype(np.float32)
    v, f, e, s = tensors(mesh)
    v64 = v.double()
    leaf = v.clone().requires_grad_()
    loss = term(name, leaf, f, e, s, backend=backend)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(detached_reference(v64, v64, f, e, s, name)), rel=1e-5)
    g, h = torch.Generator().manual_seed(1), 1e-6
    for _ in range(3):
        d = torch.randn(v.shape, generator=g).double()
        numeric = float(
            detached_reference(v64 + h * d, v64, f, e, s, name) - detached_reference(v64 - h * d, v64, f, e, s, name)
        ) / (2 * h)
        assert float((leaf.grad.double() * d).sum()) == pytest.approx(numeric, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_terms_share_one_backward_pass(backend):
    v, f, e, s = tensors(noisy_blob(10))
    alone = []
    for name in TERMS:
        leaf = v.clone().requires_grad_()
        term(name, leaf, f, e, s, backend=backend).backward()
        alone.append(leaf.grad)
    leaf = v.clone().requires_grad_()
    bend, rough = smoothness(leaf, f, e, s, backend=backend)
    (3 * bend - 0.5 * rough).backward()
    torch.testing.assert_close(leaf.grad, 3 * alone[0] - 0.5 * alone[1], rtol=1e-5, atol=1e-7)
    assert not smoothness(v, f, e, s, backend=backend)[0].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TERMS)
def test_slivers_and_faces_without_area_give_finite_values_and_gradients(name, backend):
    v, f, e, s = tensors(sphere(n=12, m=8))
    v = v.clone()
    v[5], v[20] = v[6], v[21] + 1e-7
    v = v.requires_grad_()
    term(name, v, f, e, s, backend=backend).backward()
    assert torch.isfinite(v.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_slivers_do_not_dominate_the_gradient_of_the_bend(backend):
    """Two nearly equal vertices: an unweighted mean over edges would give them a gradient of order 1 / distance."""
    v, f, e, s = tensors(sphere(n=24, m=12))
    plain = v.clone().requires_grad_()
    term("bend", plain, f, e, s, backend=backend).backward()
    pinched = v.clone()
    i, j = e[100].tolist()
    pinched[j] = pinched[i] + 1e-4 * (pinched[j] - pinched[i])
    pinched = pinched.requires_grad_()
    term("bend", pinched, f, e, s, backend=backend).backward()
    assert pinched.grad.norm(dim=1).max() < 20 * plain.grad.norm(dim=1).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mesh_without_edges_is_smooth(backend):
    none = torch.zeros(0, 2, dtype=torch.int32)
    v = torch.rand(4, 3, requires_grad=True)
    bend, rough = smoothness(v, torch.zeros(0, 3, dtype=torch.int32), none, none, backend=backend)
    (bend + rough).backward()
    assert bend.item() == rough.item() == 0 and not v.grad.any()


def test_indices_outside_the_mesh_are_refused():
    v, f, e, s = tensors(box())
    for wrong, name in (((v, f + 8, e, s), "faces"), ((v, f, e + 1, s), "edges"), ((v, f, e, s + 1), "sides")):
        with pytest.raises(ValueError, match=name):
            smoothness(*wrong)
