"""Texture look-ups and vertex normals: worked cases, grid_sample, finite differences."""

import torch

from stages.kernels.raster import texture, vertex_normals
from stages.mesh.mesh import Mesh
from tests.kernels.raster.raster_cases import EVERY, sphere


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
