"""The nvdiffrast adaptor: its mapping against a stand-in, and the package itself where it is."""

import pytest
import torch

from stages.cameras import orbit_views, to_clip
from stages.kernels.backend import Selection, selected
from stages.kernels.raster import antialias, edge_topology, interpolate, rasterise, texture
from tests.kernels.backends import fake_kernels
from tests.kernels.backends.adaptor_cases import assert_close, real, stand_ins


@pytest.fixture
def fake(monkeypatch):
    """fake(name): the backend of a stand-in in a package's place."""
    yield from stand_ins(monkeypatch)


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
        actual = picture(vertices, triangles, clip, "auto", topology)
    expected = picture(vertices, triangles, clip, "torch", topology)
    assert torch.equal(actual[0][..., 3], expected[0][..., 3]) and bool((expected[0][..., 3] > 0).any())
    assert not torch.equal(expected[0].flip(1)[..., 3], expected[0][..., 3])  # the scene has a top and a bottom
    assert_close(actual, expected, 1e-4)


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
        actual = texture(image, uv)
        top = texture(image, torch.tensor([0.5 / 7, 1 - 0.5 / 5]))
    assert_close([actual], [texture(image, uv, backend="torch")], 1e-5)
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


@pytest.mark.cuda
def test_the_real_nvdiffrast_draws_our_pictures():
    """Vertices are snapped to 1/16 pixel there, so pixels along edges may change hands."""
    real("nvdiffrast")
    vertices, triangles, clip = scene("cuda")
    topology = edge_topology(triangles, len(vertices))
    actual = picture(vertices, triangles, clip, "nvdiffrast", topology)
    expected = picture(vertices, triangles, clip, "torch", topology)
    same = actual[0][..., 3] == expected[0][..., 3]
    assert float(same.float().mean()) > 0.97
    for a, b in ((actual[0], expected[0]), (actual[1], expected[1])):
        torch.testing.assert_close(a[same], b[same], atol=1e-3, rtol=0)
    assert float((actual[2] - expected[2]).abs().mean()) < 5e-3
    for a, b in zip(actual[3:], expected[3:], strict=True):
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
