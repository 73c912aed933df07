"""The whole uniform Laplacian: by hand, and its gradient against float64 differences."""

import math

import pytest
import torch

from stages.kernels.marching import mesh_edges
from stages.kernels.smoothness import smoothness
from stages.mesh.subdivision.regularise import laplacian
from tests.mesh.mesh_shapes import noisy_blob, sphere, tetrahedron


def tensors(mesh, dtype=torch.float32):
    faces = torch.from_numpy(mesh.faces)
    return torch.from_numpy(mesh.vertices).to(dtype), faces, *mesh_edges(faces, len(mesh.vertices))


def test_laplacian_of_a_regular_tetrahedron_by_hand():
    _, _, e, _ = tensors(tetrahedron())
    v = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    # the other three have the mean -v / 3; distance 4/3 * sqrt(3), edges sqrt(8)
    assert float(laplacian(v, e)) == pytest.approx((4 / 3 * math.sqrt(3) / math.sqrt(8)) ** 2)


def test_the_tangential_part_counts():
    v, f, e, s = tensors(sphere(n=16, m=32), torch.float64)
    noise = torch.randn(v.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outwards = torch.nn.functional.normalize(v, dim=1)
    slid = v + 0.005 * (noise - (noise * outwards).sum(1, keepdim=True) * outwards)
    whole = float(laplacian(slid, e) - laplacian(v, e))
    assert whole > 10 * abs(float(smoothness(slid, f, e, s)[1] - smoothness(v, f, e, s)[1]))


def test_gradient_is_that_of_the_value_where_the_mean_edge_length_stays():
    v, _, e, _ = tensors(noisy_blob(6), torch.float64)
    leaf = v.clone().requires_grad_()
    loss = laplacian(leaf, e)
    loss.backward()

    def mean_edge(x):
        return (x[e[:, 0].long()] - x[e[:, 1].long()]).norm(dim=1).mean()

    g, h = torch.Generator().manual_seed(1), 1e-6
    for _ in range(3):
        d = torch.randn(v.shape, generator=g, dtype=torch.float64)
        ahead, behind = (laplacian(x, e) * (mean_edge(x) / mean_edge(v)) ** 2 for x in (v + h * d, v - h * d))
        assert float((leaf.grad * d).sum()) == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-5)
